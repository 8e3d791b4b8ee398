"""PyTorch files of tensors (``pytorch_model.bin``), read without running what a pickle may ask for.

Such a file is a zip archive of a pickle and of the tensors' bytes. PyTorch's restricted unpickler builds tensors and
plain values and refuses everything else; the bytes are mapped, so that opening a file reads none of them.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.errors import UserError

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAPPED_BYTES = 256 << 20  # what may be read through one mapping: its pages count as this process's memory
_ZIP = b"PK\x03\x04"


class PytorchBinReader:
    """The tensors of one file; reading looks like ``SafetensorsReader``'s."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            UserError: the file is missing or broken, holds more than tensors, or asks for code to be run.
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
            raise UserError(f"{self._path} is no table of tensors; use the model's own weight files.")
        odd = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
        if odd:
            raise UserError(f"{odd[0]} in {self._path} is no tensor; use the model's own weight files.")
        return tensors


def load_harmless(path: Path, *, mmap: bool = False) -> Any:
    """Load a PyTorch file that holds tensors and plain values only.

    Args:
        path: The file, as PyTorch 1.6 and later write it.
        mmap: Leave the tensors' bytes in the file until they are used.

    Raises:
        UserError: the file is missing or broken, or asks for something else to be built or run, which is not done.
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
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise UserError(
                f"{path} asks for {asked[1]}, which weights never need and which could run code, so nothing of it "
                "was loaded; use the model's safetensors files."
            ) from None
        raise _broken(path, error) from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, AssertionError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"{path} is not a complete PyTorch file ({reason}); download it again.")
