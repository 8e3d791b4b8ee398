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

from nemo_pvs.checkpoints.safetensors_file import tensor_bytes
from nemo_pvs.checkpoints.source import WeightSource, fingerprint, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.files import read_json, sha256_file, write_json
from nemo_pvs.layout import Layout

MANIFEST = "pvs_manifest.json"

Progress = Callable[[int, int], None]
"""Called with (done, total), both in parameters."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor under its Hugging Face name, the same in every format."""

    dtype: str
    size: tuple[int, ...]
    sha256: str
    """Of the bytes in row-major order."""


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint."""

    bytes: int
    sha256: str


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
            tensors = {
                name: TensorRecord(record["dtype"], tuple(record["size"]), record["sha256"])
                for name, record in values["tensors"].items()
            }
            files = {name: FileRecord(**record) for name, record in values["files"].items()}
            return cls(values["format"], values["source"], tensors, files)
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path} is not a manifest of nemo_pvs; convert the checkpoint again.") from None

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``."""
        write_json(folder / MANIFEST, asdict(self))

    def changed_files(self, folder: Path) -> list[str]:
        """Return the files that are missing or have another length; cheap, for checksums see ``stream.verify``."""
        return [
            name
            for name, record in self.files.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != record.bytes
        ]


class Recorder:
    """Reads a source's tensors for a writer: checks each, casts it, and keeps its record for the manifest."""

    def __init__(self, source: WeightSource, dtype: torch.dtype | None, progress: Progress | None) -> None:
        """Wrap ``source``; with a ``dtype`` every tensor is cast to it."""
        self.source = source
        self.dtype = dtype
        self.shape = shape_of(source)
        self.layout = Layout.for_config(source.config)
        self.parts = self.layout.parts(self.shape)
        self.records: dict[str, TensorRecord] = {}
        self._progress = progress
        self._done = 0

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as it is to be written.

        Raises:
            UserError: its size is not the one that the source's config implies.
        """
        tensor = self.source.read(name)
        expected = self.parts[name][0].size(self.shape)
        if tuple(tensor.shape) != expected:
            raise UserError(f"{name} is {list(tensor.shape)}, but the config implies {list(expected)}.")
        if self.dtype is not None:
            tensor = tensor.to(self.dtype)
        self.records[name] = TensorRecord(dtype_name(tensor.dtype), expected, sha256_tensor(tensor))
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
            str(path.relative_to(folder)): FileRecord(path.stat().st_size, sha256_file(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(file_format, fingerprint(self.source), self.records, files)
        manifest.write(folder)
        return manifest


def sha256_tensor(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as config files spell it: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")
