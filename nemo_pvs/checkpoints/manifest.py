"""The manifest of a checkpoint: its files, the checksum of each tensor, and the model that was written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from nemo_pvs.checkpoints.fingerprint import compute_checksums, identity
from nemo_pvs.checkpoints.read_ahead import ReadAhead
from nemo_pvs.checkpoints.source import Progress, WeightSource, shape_of
from nemo_pvs.checkpoints.tensor_record import HASH, HASHES, TensorRecord, dtype_name, record_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.system.files import read_json, sha256_file, write_json

MANIFEST = "pvs_manifest.json"

# Files of tensors, which are hashed one by one.
_WEIGHT_FILES = ("model*.safetensors", "*.distcp")
ORIGIN = "origin.json"
"""Name of the file in a checkpoint's folder that says how nemo_pvs trained it (``recipe.identity``)."""
# Not in a manifest: what is written later, and Bridge's description, whose tokenizer path changes when a checkpoint is
# moved. Our own reader takes the config that is kept next to it.
_LEFT_OUT = ("ledger.json", ORIGIN, "run_config.yaml")


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint."""

    bytes: int
    sha256: str | None
    """None for weight files: the tensors' hashes cover them."""


@dataclass(frozen=True)
class Manifest:
    """The contents of one checkpoint; two copies of a model in different formats have equal ``tensors``."""

    format: str
    """huggingface, nemo or megatron."""
    source: str
    """Fingerprint of the model that was written (``fingerprint.fingerprint``), before any change of dtype."""
    tensors: Mapping[str, TensorRecord] = field(repr=False)
    files: Mapping[str, FileRecord] = field(repr=False)
    """By path relative to the checkpoint; without the manifest itself and ``_LEFT_OUT``."""
    hash: str = HASH
    """Name of the algorithm that hashed the tensors."""

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return a checkpoint's manifest, or None if it has none because another program wrote it.

        Raises:
            UserError: there is a manifest, but it is not usable.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        values: Any = read_json(path)
        try:
            algorithm = values.get("hash", "sha256")
            if "hash" not in values:  # the first manifests
                tensors = {name: {**record, "digest": record["sha256"]} for name, record in values["tensors"].items()}
                values = {**values, "tensors": tensors, "hash": algorithm}
            manifest = _MANIFEST_FILE.validate_python(values)
        except (AttributeError, KeyError, TypeError, ValidationError):
            raise UserError(f"{path} is not a manifest of nemo_pvs; convert the checkpoint again.") from None
        if algorithm not in HASHES:
            raise UserError(
                f"{path} has {algorithm} hashes, which this version does not know ({', '.join(HASHES)}); "
                "use the version of nemo_pvs that wrote it, or convert the checkpoint again."
            )
        return manifest

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``."""
        write_json(folder / MANIFEST, asdict(self))

    def changed_files(self, folder: Path) -> list[str]:
        """Return the files that are missing or differ in length; ``verify_checkpoint`` also compares hashes."""
        return [
            name
            for name, record in self.files.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != record.bytes
        ]

    def describes(self, name: str, tensor: torch.Tensor) -> bool:
        """Return whether a tensor has the dtype, size and bytes that were written under this name."""
        return self.tensors.get(name) == record_of(tensor, self.hash)


_MANIFEST_FILE = TypeAdapter(Manifest)


class Recorder:
    """Reads a source's tensors for a writer: checks and casts each one and records it for the manifest."""

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype | None,
        progress: Progress | None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        """Wrap ``source``; every tensor is cast to ``dtype`` unless that is None."""
        self.source = source
        self.dtype = dtype
        self.shape = shape_of(source)
        self.layout = Layout.for_config(source.config)
        self.parts = self.layout.parts(self.shape)
        self.records: dict[str, TensorRecord] = {}
        self._source_records: dict[str, TensorRecord] = {}
        self._progress = progress
        self._allow_nonfinite = allow_nonfinite
        self._done = 0
        self._reads = ReadAhead(source, self.parts)
        self._read_early: dict[str, torch.Tensor] = {}

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor will be written; a tensor read to find out is kept for ``read``."""
        if self.dtype is None and name not in self._read_early:
            self._read_early[name] = self._reads.read(name)
        return self.dtype or self._read_early[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as it is to be written.

        Raises:
            UserError: it does not have the size that the source's config implies, or has NaN or infinite values that
                are not allowed.
        """
        tensor = self._read_early.pop(name) if name in self._read_early else self._reads.read(name)
        expected = self.parts[name][0].size(self.shape)
        if tuple(tensor.shape) != expected:
            raise UserError(f"{name} is {list(tensor.shape)}, but the config implies {list(expected)}.")
        self._source_records[name] = record_of(tensor)
        if self.dtype is not None:
            tensor = tensor.to(self.dtype)
        if not self._allow_nonfinite and not is_finite(tensor):
            cast = f" as {dtype_name(self.dtype)}" if self.dtype else ""
            raise UserError(
                f"{name} has NaN or infinite values{cast}, so the model cannot compute anything; use an intact "
                "checkpoint or another dtype, or copy it as it is with pvs convert --allow-nonfinite."
            )
        cast = tensor.dtype != getattr(torch, self._source_records[name].dtype)
        self.records[name] = record_of(tensor) if cast else self._source_records[name]
        self._done += tensor.numel()
        if self._progress:
            self._progress(self._done, self.shape.parameters)
        return tensor

    def config(self) -> dict[str, Any]:
        """Return the Hugging Face config of the model that was read: explicit sizes, the dtype of most parameters."""
        parameters: Counter[str] = Counter()
        for record in self.records.values():
            parameters[record.dtype] += math.prod(record.size)
        config = self.layout.config(self.shape, self.source.config)
        keys = {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}  # transformers renamed it in 4.56
        return {**config, **dict.fromkeys(keys, parameters.most_common(1)[0][0])}

    def finish(self, folder: Path, file_format: str) -> Manifest:
        """Write the manifest of the tensors that were read and of every file below ``folder``, and return it."""
        return _write_manifest(folder, file_format, self.source, self._source_records, self.records)


def describe_tensors(
    source: WeightSource, folder: Path, file_format: str, *, progress: Progress | None = None
) -> Manifest:
    """Write the manifest of a checkpoint that another program wrote into ``folder``, and return it.

    Args:
        source: The checkpoint.
        folder: The folder that it is in.
        file_format: huggingface or nemo.
        progress: Called with (done, total) parameters.

    Raises:
        UserError: a tensor cannot be read.
    """
    records = compute_checksums(source, progress)
    return _write_manifest(folder, file_format, source, records, records)


def _write_manifest(
    folder: Path,
    file_format: str,
    source: WeightSource,
    read: Mapping[str, TensorRecord],
    written: Mapping[str, TensorRecord],
) -> Manifest:
    """Write the manifest of all files below ``folder``; ``read`` has the tensors before any change of dtype."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in _LEFT_OUT:
            files[str(path.relative_to(folder))] = FileRecord(path.stat().st_size, _file_hash(path))
    manifest = Manifest(file_format, identity(source.config, read), written, files)
    manifest.write(folder)
    return manifest


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity; one pass, 50 times as fast as ``isfinite().all()``."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))  # any NaN makes both NaN


def _file_hash(path: Path) -> str | None:
    return None if any(path.match(pattern) for pattern in _WEIGHT_FILES) else sha256_file(path)
