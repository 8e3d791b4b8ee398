"""The weight files of a Hugging Face folder, one or many, safetensors or PyTorch, as one table of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from nemo_pvs.checkpoints.files.pytorch_bin import PytorchBinReader
from nemo_pvs.checkpoints.files.safetensors_file import SafetensorsReader
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json

# In the order in which transformers looks for them; each may be split into shards with an index.
_NAMES = ("model.safetensors", "pytorch_model.bin")


class Shard(Protocol):
    """One weight file."""

    @property
    def names(self) -> list[str]:
        """Names of its tensors."""

    def size(self, name: str) -> tuple[int, ...]:
        """Return a tensor's size."""

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""

    def read(self, name: str) -> torch.Tensor:
        """Return a fresh copy of a tensor."""


class Shards:
    """All tensors in a folder's weight files, each exactly once."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Raises:
            UserError: there are no weight files, one is missing or broken, two have the same tensor, or a file lacks
                a tensor that the index assigns to it.
        """
        self._folder = folder
        single_file, weight_map = _find(folder)
        files = [single_file] if weight_map is None else sorted({*weight_map.values()})
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise UserError(f"{few(missing)} of {folder} {is_are(missing)} missing; download the model again.")
        self._files = {file: _open(folder / file) for file in files}
        self._file_of: dict[str, str] = {}
        duplicates = []
        for file, shard in self._files.items():
            duplicates += [name for name in shard.names if name in self._file_of]
            self._file_of.update(dict.fromkeys(shard.names, file))
        if duplicates:
            raise UserError(
                f"{few(duplicates)} {is_are(duplicates)} in more than one file of {folder}; download the model again."
            )
        lost = [name for name, file in (weight_map or {}).items() if self._file_of.get(name) != file]
        if lost:
            raise UserError(
                f"{few(lost)} {is_are(lost)} not in the file of {folder} that its index names; "
                "download the model again."
            )

    @property
    def files(self) -> list[Path]:
        """The files."""
        return [self._folder / file for file in self._files]

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def size(self, name: str) -> tuple[int, ...]:
        """Return a tensor's size."""
        return self._shard(name).size(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype.

        Raises:
            UserError: it is not one of the floating-point types of unquantised weights.
        """
        return self._shard(name).dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a fresh copy of a tensor.

        Raises:
            UserError: its file can no longer be read.
        """
        try:
            return self._shard(name).read(name)
        except OSError as error:
            raise UserError(
                f"Cannot read {name} from {self._folder / self._file_of[name]}: {error.strerror}; "
                "download the model again."
            ) from error

    def _shard(self, name: str) -> Shard:
        if name not in self._file_of:
            raise UserError(f"{self._folder} has no tensor {name}; is this the model that its config.json describes?")
        return self._files[self._file_of[name]]


def few(names: list[str], limit: int = 3) -> str:
    """Return the first names of a list for use in a sentence: ``a, b, c and 4 more``."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def is_are(names: list[str]) -> str:
    """Return the verb that agrees with a list of names."""
    return "is" if len(names) == 1 else "are"


def _find(folder: Path) -> tuple[str, dict[str, str] | None]:
    """Return the name of the weight file and, if it is split, the index's map from tensors to files."""
    for name in _NAMES:
        if (folder / name).is_file():
            return name, None
        index = folder / f"{name}.index.json"
        if index.is_file():
            return name, _weight_map(index)
    raise UserError(
        f"{folder} has none of {', '.join(_NAMES)} and their .index.json; download the model's weight files."
    )


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
        raise UserError(f"{index} has no usable weight_map; download it again.")
    return weight_map


def _open(path: Path) -> Shard:
    return SafetensorsReader(path) if path.suffix == ".safetensors" else PytorchBinReader(path)
