"""Reads GGUF files: keys with values, and named tensors that are dequantised one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_pvs.errors import UserError
from nemo_pvs.model.not_a_model import refuse_lfs_pointer

_MISSING = object()

# Unquantised tensors keep their dtype. Quantised ones become bf16, which has more bits than they had.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufFile:
    """The keys and tensors of one GGUF file; tensors stay on disk until they are read."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            UserError: the file is broken or has only a part of a model.
        """
        self.path = path
        refuse_lfs_pointer(path)
        try:
            reader = _open(path)
            self._keys = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # a broken file can raise anything
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{path} is not a readable GGUF file ({reason}); download it again.") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.get("split.count", 1) > 1:
            raise UserError(
                f"{path} is one of {self.get('split.count')} parts of a model; join them with llama.cpp's "
                "llama-gguf-split --merge, and give the whole file."
            )

    @property
    def keys(self) -> list[str]:
        """Names of all keys."""
        return list(self._keys)

    @property
    def tensors(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Return the value of a key, or ``default``.

        Raises:
            UserError: there is neither such a key nor a default, or the value's type is not that of the default.
        """
        value = self._keys.get(key, default)
        if value is _MISSING:
            raise UserError(f"{self.path} lacks the key {key}; convert the model to GGUF again.")
        if default is not _MISSING and default is not None and not isinstance(value, type(default)):
            raise UserError(f"{key} in {self.path} is {value!r}; convert the model to GGUF again.")
        return value

    def size(self, name: str) -> tuple[int, ...]:
        """Return a tensor's size, outermost axis first."""
        return tuple(int(length) for length in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor that ``read`` returns: the stored one, or bfloat16 if it is quantised."""
        return _DTYPES.get(self._tensors[name].tensor_type.name, torch.bfloat16)

    def read(self, name: str) -> torch.Tensor:
        """Return a fresh copy of a tensor.

        Raises:
            UserError: its quantisation type is unknown.
        """
        from gguf import dequantize

        stored = self._tensors[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{name} in {self.path} is quantised as {stored.tensor_type.name}, which the gguf package cannot "
                "read; use a file with another quantisation."
            ) from None
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(self.dtype(name)).reshape(self.size(name))


def _open(path: Path) -> Any:
    """Return a reader that raises ValueError where it would read beyond the end of the file.

    The package's own reader returns empty values there, and loops over billions of them for a damaged array.
    """
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

    return Reader(path)
