"""The index (``.idx``) of a Megatron token file: writes it, and checks that it is complete and belongs to the data."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemo_pvs.errors import UserError

# Magic, version, type code, number of sequences, number of document boundaries. Then the length of each sequence in
# tokens (int32), the offset of each in bytes (int64), and the first sequence of each document plus the end (int64).
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes per token by type code; the codes 6 and 7 are floating-point numbers."""

_CODES = {"int32": 4, "uint16": 8}
_UINT16_VOCABULARY = 65_500
"""Megatron stores the ids of smaller vocabularies as uint16."""

_CHUNK = 1 << 20


def token_dtype(vocab: int) -> str:
    """Return NumPy's name of the type in which Megatron stores ids of a vocabulary."""
    return "uint16" if vocab < _UINT16_VOCABULARY else "int32"


def write_index(path: Path, lengths: Sequence[Path], dtype: str) -> None:
    """Write the index of documents that are one sequence each, in chunks.

    Args:
        path: The index to write.
        lengths: Files with the number of tokens of each document as int32, one file after another.
        dtype: The type of the ids, from ``token_dtype``.
    """
    documents = sum(file.stat().st_size // 4 for file in lengths)
    item_bytes = _ITEM_BYTES[_CODES[dtype]]
    offset = 0
    with open(path, "wb") as index:
        index.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], documents, documents + 1))
        for chunk in _chunks(lengths):
            index.write(chunk.tobytes())
        for chunk in _chunks(lengths):
            ends = offset + np.cumsum(chunk, dtype=np.int64) * item_bytes
            index.write((ends - chunk.astype(np.int64) * item_bytes).tobytes())
            offset = int(ends[-1])
        for first in range(0, documents + 1, _CHUNK):
            index.write(np.arange(first, min(first + _CHUNK, documents + 1), dtype=np.int64).tobytes())


def _chunks(lengths: Sequence[Path]) -> Iterator[npt.NDArray[np.int32]]:
    for path in lengths:
        count = path.stat().st_size // 4
        for first in range(0, count, _CHUNK):
            yield np.fromfile(path, np.int32, min(_CHUNK, count - first), offset=4 * first)


def count_indexed_tokens(index: Path, data: Path) -> int:
    """Return the number of tokens in a token file according to its index, which is read in chunks.

    Raises:
        UserError: the index is not Megatron's, is truncated or damaged, or belongs to other data.
    """
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{index} is not an index of Megatron's token files; tokenise the corpus again.")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != _VERSION or code not in _ITEM_BYTES:
        raise UserError(
            f"{index} is of an unsupported kind (version {version}, type {code}); tokenise the corpus again."
        )
    expected = _HEADER.size + (4 + 8) * sequences + 8 * boundaries
    size = index.stat().st_size
    if size < expected:
        raise UserError(
            f"{index} is truncated: it has {size:,} bytes but needs {expected:,}; download it again, or tokenise the "
            "corpus again."
        )
    if size not in (expected, expected + sequences):  # multimodal data has one more byte per sequence, its mode
        raise _damaged(index)
    tokens = _check_sequences(index, sequences, _ITEM_BYTES[code])
    _check_boundaries(index, sequences, boundaries)
    if tokens * _ITEM_BYTES[code] != data.stat().st_size:
        raise UserError(f"{data} and {index} do not match; one may be truncated, tokenise the corpus again.")
    return tokens


def _check_sequences(index: Path, sequences: int, item_bytes: int) -> int:
    """Check that each sequence begins where the previous one ends; return the sum of the lengths."""
    tokens = 0
    for first in range(0, sequences, _CHUNK):
        count = min(_CHUNK, sequences - first)
        lengths = np.fromfile(index, np.int32, count, offset=_HEADER.size + 4 * first)
        begins = np.fromfile(index, np.int64, count, offset=_HEADER.size + 4 * sequences + 8 * first)
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        if lengths.min() < 0 or not np.array_equal(begins, (ends - lengths) * item_bytes):
            raise _damaged(index)
        tokens = int(ends[-1])
    return tokens


def _check_boundaries(index: Path, sequences: int, boundaries: int) -> None:
    """Check that the documents partition the sequences in order."""
    last = 0
    for first in range(0, boundaries, _CHUNK):
        count = min(_CHUNK, boundaries - first)
        starts = np.fromfile(index, np.int64, count, offset=_HEADER.size + 12 * sequences + 8 * first)
        if (first == 0 and starts[0] != 0) or starts[0] < last or (np.diff(starts) < 0).any():
            raise _damaged(index)
        last = int(starts[-1])
    if last != sequences:
        raise _damaged(index)


def _damaged(index: Path) -> UserError:
    return UserError(f"{index} is damaged; download it again, or tokenise the corpus again.")
