"""Reads lines of plain and compressed text, also of a part of a file; a truncated file is never an early end."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""Exceptions that reading a damaged file can raise; ``EOFError`` means that it ends inside a compressed frame."""

_CHUNK_BYTES = 1 << 14
_LARGEST_WINDOW = 1 << 31
"""How far back a Zstandard frame may refer, which takes as much memory: that of ``zstd --long=31``, as of large dumps.
The library allows 128 MiB unless it is told."""
_MOST_HEADER_BYTES = 18
_CHECKSUM_BYTES = 4
_RUN_LENGTH = 1
"""The type of a block that is one byte, repeated."""

_Pieces = Iterator[tuple[bytes, bool]]
"""Consecutive content, and whether it is past the end of the part that is read."""


def open_text(path: Path, encoding: str, start: int = 0, end: int | None = None) -> IO[str]:
    """Open a ``.gz``, ``.zst`` or plain text file, or a part of one, for reading.

    A compressed file may consist of several members or frames, as written by parallel compressors or concatenation.
    A part holds the lines that begin after the byte ``start`` and not after the byte ``end``, and the first part also
    the first line. So each line is in exactly one of consecutive parts, wherever they are divided.

    Args:
        path: The file.
        encoding: Of the text. In parts the byte of a line feed must mean nothing else, as in UTF-8.
        start: Where the part begins, in bytes of the file; in a ``.zst`` file, at a frame. 0 in a ``.gz`` file.
        end: Where it ends, likewise; None for the end of the file.

    Raises:
        EOFError: the compressed file is empty; also raised on reading if it ends inside a frame.
    """
    compressed = path.suffix in (".gz", ".zst")
    if compressed and not path.stat().st_size:
        raise EOFError("it is empty")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding)
    if not compressed and start == 0 and end is None:
        return open(path, encoding=encoding)
    file = open(path, "rb")  # noqa: SIM115 - the stream closes it
    pieces = (_content_of_frames if compressed else _plain_content)(file, start, end)
    lines = _Stream(file, _whole_lines(pieces, within_line=start > 0))
    return io.TextIOWrapper(io.BufferedReader(lines), encoding=encoding)


def frame_starts(path: Path) -> list[int]:
    """Return where the frames of a ``.zst`` file begin, in bytes. Where the file is damaged, the last one ends.

    Only the headers of frames and blocks are read, of which there is one in at most 128 KiB of content.
    """
    size = path.stat().st_size
    starts = []
    position = 0
    with open(path, "rb", buffering=0) as file:
        while position < size:
            starts.append(position)
            position = _frame_end(file, position) or size
    return starts


def _frame_end(file: IO[bytes], position: int) -> int | None:
    """Return where the frame ends that begins at ``position``; None if none begins there."""
    file.seek(position)
    header = file.read(_MOST_HEADER_BYTES)
    if len(header) >= 8 and header[1:4] == b"\x2a\x4d\x18" and header[0] >> 4 == 5:  # a frame to be skipped
        return position + 8 + int.from_bytes(header[4:8], "little")
    if not header.startswith(zstandard.FRAME_HEADER):
        return None
    try:
        parameters = zstandard.get_frame_parameters(header)
        position += zstandard.frame_header_size(header)
    except zstandard.ZstdError:
        return None
    last = False
    while not last:
        file.seek(position)
        block = int.from_bytes(file.read(3).ljust(3, b"\x01"), "little")  # the end of the file is an end, too
        last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        position += 3 + (1 if kind == _RUN_LENGTH else length)
    return position + (_CHECKSUM_BYTES if parameters.has_checksum else 0)


def _plain_content(file: BinaryIO, start: int, end: int | None) -> _Pieces:
    """Yield the content from ``start`` to the end of the file."""
    file.seek(start)
    position = start
    while True:
        to_end = _CHUNK_BYTES if end is None or position >= end else end - position
        content = file.read(min(_CHUNK_BYTES, to_end))
        if not content:
            return
        yield content, end is not None and position >= end
        position += len(content)


def _content_of_frames(file: BinaryIO, start: int, end: int | None) -> _Pieces:
    """Yield the concatenated content of all frames from the one that begins at ``start`` to the end of the file.

    The library's own ``stream_reader`` accepts the end of the file as the end of a frame, even in the middle of it.

    Raises:
        EOFError: the file ends inside a frame.
        zstandard.ZstdError: a frame is damaged.
    """
    file.seek(start)
    position = start  # of ``compressed``
    past_end = False
    frame = None
    compressed = b""
    while compressed := compressed or file.read(_CHUNK_BYTES):
        if frame is None:
            frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
            past_end = end is not None and position >= end
        content, left = frame.decompress(compressed), frame.unused_data
        position += len(compressed) - len(left)
        compressed = left
        if frame.eof:
            frame = None
        if content:
            yield content, past_end
    if frame is not None:
        raise EOFError("the last Zstandard frame is incomplete")


def _whole_lines(pieces: _Pieces, *, within_line: bool) -> Iterator[bytes]:
    """Yield the content of the lines of a part (``open_text``); ``within_line``: the first piece may begin inside."""
    for piece, past_end in pieces:
        content = piece
        if within_line:
            if past_end:
                return
            _, line_feed, content = content.partition(b"\n")
            within_line = not line_feed
        if past_end:
            line, line_feed, _ = content.partition(b"\n")
            yield line + line_feed
            if line_feed:
                return
        elif content:
            yield content


class _Stream(io.RawIOBase):
    """Pieces of content as a file."""

    def __init__(self, file: BinaryIO, pieces: Iterable[bytes]) -> None:
        """``file`` is what the pieces are read from."""
        self._file = file
        self._pieces = iter(pieces)
        self._content = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Copy the next piece of content into ``buffer`` and return its length in bytes; 0 at the end."""
        while not self._content:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._content = memoryview(piece)
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
