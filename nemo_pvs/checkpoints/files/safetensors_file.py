"""The safetensors format as a stream: one tensor in memory at a time, whatever the size of the file.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes
(https://huggingface.co/docs/safetensors). The library's own reader maps the whole file into memory and returns the
same pages on every read, so a tensor modified in place stays modified for the next reader; here every read is a fresh
copy.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.system.direct_io import StreamedReader, StreamedWriter

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PACKED_BITS = {"U8": torch.uint8}
"""The dtype of mask files (masks.py)."""
_DTYPE_NAMES = {dtype: name for name, dtype in {**_DTYPES, **PACKED_BITS}.items()}

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_ENTRY_BYTES = 200  # a header entry without its name: dtype, a few dimensions and two offsets of up to 20 digits


class SafetensorsReader:
    """The tensors of one file; only the header stays in memory, and the file is open only during reads."""

    def __init__(self, path: Path, dtypes: Mapping[str, torch.dtype] = _DTYPES) -> None:
        """Read the header; ``dtypes`` maps the format's dtype codes that may be read to PyTorch's dtypes.

        Raises:
            UserError: the file is missing, or is not a complete safetensors file.
        """
        self._path = path
        self._dtypes = dtypes
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > _MAX_HEADER_BYTES:
                    raise ValueError("the header is too large")
                self._header: dict[str, Any] = json.loads(file.read(length))
                self._header.pop("__metadata__", None)
                self._start = 8 + length
            self._check_extents()
        except FileNotFoundError:
            raise UserError(f"{path} is missing; download it again.") from None
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a complete safetensors file ({error}); download it again.") from None

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the file."""
        return list(self._header)

    def size(self, name: str) -> tuple[int, ...]:
        """Return a tensor's size."""
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype.

        Raises:
            UserError: it is not one of the floating-point types of unquantised weights.
        """
        code = self._header[name]["dtype"]
        if code not in self._dtypes:
            raise UserError(
                f"{name} in {self._path} is stored as {code}; only {', '.join(self._dtypes)} are read, "
                "so use the unquantised model."
            )
        return self._dtypes[code]

    def read(self, name: str) -> torch.Tensor:
        """Return a fresh copy of a tensor."""
        tensor = torch.empty(self.size(name), dtype=self.dtype(name))
        with StreamedReader(self._path) as file:
            file.seek(self._start + self._header[name]["data_offsets"][0])
            received = file.readinto(tensor_bytes(tensor))
        if received != tensor.nbytes:
            raise UserError(f"{self._path} ends inside {name}; download it again.")
        return tensor

    def _check_extents(self) -> None:
        room = os.path.getsize(self._path) - self._start
        for name, entry in self._header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= room:
                raise ValueError(f"it ends before {name} does")
            if (
                entry["dtype"] in self._dtypes
                and end - begin != math.prod(entry["shape"]) * self._dtypes[entry["dtype"]].itemsize
            ):
                raise ValueError(f"{name} has {end - begin} bytes, which is not its shape")


class SafetensorsWriter:
    """Writes tensors sequentially; space for the header is reserved at the start and filled in at the end.

    So only the names of possible tensors must be known in advance, and each is read from its source only once.
    """

    def __init__(self, path: Path, may_hold: Iterable[str]) -> None:
        """Start a file that will hold some of the tensors named in ``may_hold``."""
        self.path = path
        self.bytes_written = 0
        self._header: dict[str, Any] = {}
        needed = _ENTRY_BYTES + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in may_hold)
        self._header_bytes = (needed + 7) // 8 * 8  # tensors start at a multiple of 8, as the format recommends
        self._file = StreamedWriter(path)
        self._file.write(bytes(8 + self._header_bytes))

    @property
    def names(self) -> list[str]:
        """Names of the tensors written so far."""
        return list(self._header)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor."""
        begin = self.bytes_written
        self.bytes_written += self._file.write(tensor_bytes(tensor))
        self._header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self.bytes_written],
        }

    def finish(self) -> None:
        """Write the header, padded with spaces; until then the file is not readable."""
        self._file.close()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        with open(self.path, "r+b") as file:
            file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, without a copy if it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
