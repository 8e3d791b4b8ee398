"""PyTorch files of tensors (``pytorch_model.bin``), read without running code from their pickle.

Such a file is a zip archive of a pickle and of the tensors' bytes. PyTorch's restricted unpickler builds tensors and
plain values and refuses everything else; the bytes are memory-mapped, so opening a file reads none of them.
"""

from __future__ import annotations

import pickle
import re
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.errors import UserError

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAPPED_BYTES = 256 << 20  # limit for reading through one mapping, whose pages count as this process's memory
_ZIP = b"PK\x03\x04"


class PytorchBinReader:
    """The tensors of one file, with the same interface as ``SafetensorsReader``."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            UserError: the file is missing or broken, contains anything but tensors, or would run code.
        """
        self._path = path
        self._tensors = self._map()
        self._bytes_read = 0

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the file."""
        return list(self._tensors)

    def size(self, name: str) -> tuple[int, ...]:
        """Return a tensor's size."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype.

        Raises:
            UserError: it is not one of the floating-point types of unquantised weights.
        """
        tensor = self._tensors[name]
        if tensor.dtype not in _FLOATING or tensor.layout != torch.strided:
            raise UserError(
                f"{name} in {self._path} is stored as {str(tensor.dtype).removeprefix('torch.')}; only dense "
                "floating-point weights are read, so use the unquantised model."
            )
        return tensor.dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a fresh copy of a tensor."""
        self.dtype(name)
        copy = self._tensors[name].detach().clone(memory_format=torch.contiguous_format)
        self._bytes_read += copy.nbytes
        if self._bytes_read > _MAPPED_BYTES:
            self._tensors, self._bytes_read = self._map(), 0
        return copy

    def _map(self) -> dict[str, torch.Tensor]:
        tensors = load_harmless(self._path, mmap=True)
        if not isinstance(tensors, dict):
            raise UserError(f"{self._path} is not a dictionary of tensors; use the model's own weight files.")
        others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise UserError(f"{others[0]} in {self._path} is not a tensor; use the model's own weight files.")
        return tensors


def load_harmless(path: Path, *, mmap: bool = False) -> Any:
    """Load a PyTorch file that contains only tensors and plain values.

    Args:
        path: The file, as PyTorch 1.6 and later write it.
        mmap: Leave the tensors' bytes in the file until they are used.

    Raises:
        UserError: the file is missing or broken, or would build or run anything else; nothing of it is run.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_ZIP)) != _ZIP:
                raise UserError(
                    f"{path} is not a file of PyTorch 1.6 or later; download it again, or use the model's "
                    "safetensors files."
                )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download it again.") from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path} asks for {refused[1]}, which weights never need and which could run code, so nothing of it "
                "was loaded; use the model's safetensors files."
            ) from None
        raise _broken(path, error) from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, AssertionError) as error:
        raise _broken(path, error) from None


def enum_member(members: Any, name: Any) -> Any:
    """Stand in for ``getattr`` in a pickle: Python 3.11.0 to 3.11.3 pickles an enumeration's member as a call of it.

    Raises:
        UnpicklingError: ``members`` is no enumeration, or has no such member.
    """
    if not isinstance(members, EnumMeta) or name not in members.__members__:
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return members[name]


def _broken(path: Path, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"{path} is not a complete PyTorch file ({reason}); download it again.")
