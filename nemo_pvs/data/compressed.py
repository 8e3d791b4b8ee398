"""Reads compressed text; a truncated file is always an error, never an early end."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""Exceptions that reading a damaged file can raise; ``EOFError`` means that it ends inside a compressed frame."""

_CHUNK_BYTES = 1 << 14


def open_text(path: Path, encoding: str) -> IO[str]:
    """Open a ``.gz``, ``.zst`` or plain text file for reading.

    A compressed file may consist of several members or frames, as written by parallel compressors or concatenation.

    Raises:
        EOFError: the compressed file is empty; also raised on reading if it ends inside a frame.
    """
    if path.suffix not in (".gz", ".zst"):
        return open(path, encoding=encoding)
    if not path.stat().st_size:
        raise EOFError("it is empty")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding)
    return io.TextIOWrapper(io.BufferedReader(_ZstandardFrames(open(path, "rb"))), encoding=encoding)


class _ZstandardFrames(io.RawIOBase):
    """The concatenated content of all frames in a file.

    The library's own ``stream_reader`` accepts the end of the file as the end of a frame, even in the middle of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Copy the next piece of content into ``buffer`` and return its length in bytes; 0 at the end of the file.

        Raises:
            EOFError: the file ends inside a frame.
            zstandard.ZstdError: a frame is damaged.
        """
        while not self._content:
            self._compressed = self._compressed or self._file.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._begun:
                    raise EOFError("the last Zstandard frame is incomplete")
                return 0
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._begun, self._compressed = not self._frame.eof, self._frame.unused_data
            if not self._begun:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
