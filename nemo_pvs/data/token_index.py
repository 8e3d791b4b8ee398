"""Checks the index (``.idx``) of a Megatron token file: that it is complete and belongs to the data file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from nemo_pvs.errors import UserError

# Magic, version, type code, number of sequences, number of document boundaries. Then the length of each sequence in
# tokens (int32), the offset of each in bytes (int64), and the first sequence of each document plus the end (int64).
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes per token by type code; the codes 6 and 7 are floating-point numbers."""

_CHUNK = 1 << 20


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
