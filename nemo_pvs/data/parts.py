"""Divides text files into parts of similar size, which workers can read independently of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from nemo_pvs.data.compressed import frame_starts

_LEAST_BYTES = 1 << 23
_MOST_PARTS = 4096
"""Besides those of other files: every part is a folder until all are joined."""


@dataclass(frozen=True)
class FilePart:
    """A file, or the part of one from ``start`` to ``end`` as in ``corpus.read_file``."""

    file: Path | None
    start: int = 0
    end: int | None = None


def divide(files: Sequence[Path | None], part_bytes: int | None = None) -> list[FilePart]:
    """Divide files into parts, which together are the files in their order.

    JSON lines are divided anywhere, ``.jsonl.zst`` between frames and Parquet files between row groups. Other files,
    and files with one frame or row group, are a part each.

    Args:
        files: From ``corpus.input_files``.
        part_bytes: Least size of a part in bytes of the file; None for a size that depends on that of all files.
    """
    sizes = [file.stat().st_size if file else 0 for file in files]
    least = part_bytes or max(_LEAST_BYTES, sum(sizes) // _MOST_PARTS)
    parts = []
    for file, size in zip(files, sizes, strict=True):
        starts = _starts(file, size, least) if file and size > least else [0]
        parts += [FilePart(file, start, end) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    return parts


def _starts(file: Path, size: int, least: int) -> list[int]:
    """Return where the parts of a file begin."""
    if file.name.endswith(".jsonl"):
        return list(range(0, size, least))
    if file.name.endswith(".jsonl.zst"):
        frames = frame_starts(file)
        return _spaced(frames, frames, least)
    if file.suffix == ".parquet":
        offsets = _row_groups(file)
        return _spaced(list(range(len(offsets))), offsets, least)
    return [0]


def _row_groups(file: Path) -> list[int]:
    """Return the offset of every row group of a Parquet file in bytes; of a damaged file, only that of the first."""
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        return [0]
    ends = [0]
    for group in groups:
        ends.append(ends[-1] + sum(group.column(index).total_compressed_size for index in range(group.num_columns)))
    return ends[:-1] or [0]


def _spaced(candidates: Sequence[int], offsets: Sequence[int], least: int) -> list[int]:
    """Return those candidates whose offsets are at least ``least`` apart."""
    starts, last = [0], 0
    for candidate, offset in zip(candidates, offsets, strict=True):
        if offset - last >= least:
            starts.append(candidate)
            last = offset
    return starts
