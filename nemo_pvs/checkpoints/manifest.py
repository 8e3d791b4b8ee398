"""The manifest of a written checkpoint: what is in it, down to each tensor's checksum, and what it was made from."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from nemo_pvs.checkpoints.read_ahead import ReadAhead
from nemo_pvs.checkpoints.safetensors_file import tensor_bytes
from nemo_pvs.checkpoints.source import WeightSource, fingerprint, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.files import read_json, sha256_file, write_json
from nemo_pvs.layout import Layout

MANIFEST = "pvs_manifest.json"

HASH = "xxh3_128"
"""What new manifests name tensors by: 128 bits, as fast as memory, against damage and mix-ups but not against forgers
(https://xxhash.com). SHA-256 of every tensor took longer than all the rest of a conversion."""

_HASHES: dict[str, Callable[[memoryview], Any]] = {
    HASH: xxhash.xxh3_128,
    "sha256": hashlib.sha256,  # the first manifests, which do not say so
}

# Their contents are tensors, which have hashes of their own.
_WEIGHT_FILES = ("model*.safetensors", "*.distcp")

Progress = Callable[[int, int], None]
"""Called with (done, total), both in parameters."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor under its Hugging Face name, the same in every format."""

    dtype: str
    size: tuple[int, ...]
    digest: str
    """Hash, by the manifest's algorithm, of the bytes in row-major order; hexadecimal."""


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint."""

    bytes: int
    sha256: str | None
    """None for files of weights: the tensors' hashes cover them."""


@dataclass(frozen=True)
class Manifest:
    """The contents of one checkpoint; two copies of a model in different formats have equal ``tensors``."""

    format: str
    """huggingface or nemo."""
    source: str
    """Fingerprint of the model that was written (``source.fingerprint``), before any change of dtype."""
    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileRecord]
    """By path relative to the checkpoint; the manifest itself is not among them."""
    hash: str = HASH
    """Name of the algorithm of the tensors' hashes."""

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return a checkpoint's manifest, or None when it was not written by us.

        Raises:
            UserError: there is a manifest, but not a usable one.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        values: Any = read_json(path)
        try:
            algorithm = values.get("hash", "sha256")
            key = "digest" if "hash" in values else "sha256"
            tensors = {
                name: TensorRecord(record["dtype"], tuple(record["size"]), record[key])
                for name, record in values["tensors"].items()
            }
            files = {name: FileRecord(**record) for name, record in values["files"].items()}
            manifest = cls(values["format"], values["source"], tensors, files, algorithm)
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path} is not a manifest of nemo_pvs; convert the checkpoint again.") from None
        if algorithm not in _HASHES:
            raise UserError(
                f"{path} has hashes by {algorithm}, which this version does not know ({', '.join(_HASHES)}); "
                "use the version of nemo_pvs that wrote it, or convert the checkpoint again."
            )
        return manifest

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``."""
        write_json(folder / MANIFEST, asdict(self))

    def changed_files(self, folder: Path) -> list[str]:
        """Return the files that are missing or have another length; cheap, for hashes see ``verify_checkpoint``."""
        return [
            name
            for name, record in self.files.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != record.bytes
        ]

    def describes(self, name: str, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is the one that was written under this name: its dtype, size and bytes."""
        return self.tensors[name] == _record(tensor, self.hash)


class Recorder:
    """Reads a source's tensors for a writer: checks each, casts it, and keeps its record for the manifest."""

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype | None,
        progress: Progress | None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        """Wrap ``source``; with a ``dtype`` every tensor is cast to it."""
        self.source = source
        self.dtype = dtype
        self.shape = shape_of(source)
        self.layout = Layout.for_config(source.config)
        self.parts = self.layout.parts(self.shape)
        self.records: dict[str, TensorRecord] = {}
        self._progress = progress
        self._allow_nonfinite = allow_nonfinite
        self._done = 0
        self._reads = ReadAhead(source, self.parts)
        self._looked_at: dict[str, torch.Tensor] = {}

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor will be written; what must be read to tell is kept for ``read``."""
        if self.dtype is None and name not in self._looked_at:
            self._looked_at[name] = self._reads.read(name)
        return self.dtype or self._looked_at[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as it is to be written.

        Raises:
            UserError: its size is not the one that the source's config implies, or it has NaN or infinite values
                that are not allowed.
        """
        tensor = self._looked_at.pop(name) if name in self._looked_at else self._reads.read(name)
        expected = self.parts[name][0].size(self.shape)
        if tuple(tensor.shape) != expected:
            raise UserError(f"{name} is {list(tensor.shape)}, but the config implies {list(expected)}.")
        if self.dtype is not None:
            tensor = tensor.to(self.dtype)
        if not self._allow_nonfinite and not is_finite(tensor):
            cast = f" as {dtype_name(self.dtype)}" if self.dtype else ""
            raise UserError(
                f"{name} has NaN or infinite values{cast}, with which a model computes nothing; use an intact "
                "checkpoint or another dtype, or pass --allow-nonfinite."
            )
        self.records[name] = _record(tensor, HASH)
        self._done += tensor.numel()
        if self._progress:
            self._progress(self._done, self.shape.parameters)
        return tensor

    def config(self) -> dict[str, Any]:
        """Return the Hugging Face config of what was read: explicit sizes, and the dtype of most parameters."""
        parameters: Counter[str] = Counter()
        for record in self.records.values():
            parameters[record.dtype] += math.prod(record.size)
        config = self.layout.config(self.shape, self.source.config)
        keys = {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}  # transformers renamed it in 4.56
        return {**config, **dict.fromkeys(keys, parameters.most_common(1)[0][0])}

    def finish(self, folder: Path, file_format: str) -> Manifest:
        """Write the manifest of what was read, and of every file below ``folder``, and return it."""
        files = {
            str(path.relative_to(folder)): FileRecord(path.stat().st_size, _file_hash(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(file_format, fingerprint(self.source), self.records, files)
        manifest.write(folder)
        return manifest


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is free of NaN and infinities; in one pass, 50 times as fast as ``isfinite().all()``."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))  # NaN anywhere makes both NaN


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as config files spell it: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")


def _record(tensor: torch.Tensor, algorithm: str) -> TensorRecord:
    digest = _HASHES[algorithm](tensor_bytes(tensor)).hexdigest()
    return TensorRecord(dtype_name(tensor.dtype), tuple(tensor.shape), digest)


def _file_hash(path: Path) -> str | None:
    return None if any(path.match(pattern) for pattern in _WEIGHT_FILES) else sha256_file(path)
