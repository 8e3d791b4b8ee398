"""Reads and writes files as large as a model without the page cache.

A checkpoint that is read or written once would evict pages that others use again, and where new pages are expensive
(on a virtual machine whose host allocates memory on demand) the cache costs more than the disk access itself
(tests/benchmarks/README.md). So blocks are transferred between the disk and reused buffers, while a thread handles the
next or previous block. If the file system does not support this (``O_DIRECT``), the cache is used as usual.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 16 << 20
"""Large enough for the disk's full speed, small compared with a tensor."""
_SECTOR_BYTES = 4096
"""Direct access must be aligned to disk sectors, of 512 or 4096 bytes."""

_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 on systems without it, such as macOS

_idle_blocks: list[memoryview] = []
"""Blocks that no file is using; kept because allocating new memory is the most expensive part."""


class StreamedReader(FileIO):
    """A file opened for reading whose ``readinto`` fills the whole buffer and bypasses the cache for large ones."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            OSError: it cannot be opened.
        """
        super().__init__(path, "rb")

    def readinto(self, target: Any) -> int:
        """Fill ``target`` up to the end of the file and return the number of bytes read.

        Raises:
            OSError: the disk cannot read them.
        """
        whole = memoryview(target).cast("B")
        done = self._read_directly(whole) if len(whole) >= _BLOCK_BYTES else 0
        while done < len(whole) and (received := super().readinto(whole[done:])):  # at most 2 GB a call
            done += received
        return done

    def _read_directly(self, target: memoryview) -> int:
        """Fill as much as can be read without the cache, advance the position and return the number of bytes."""
        begin = self.tell()
        skip = begin % _SECTOR_BYTES
        done = 0
        for block in _blocks_of(Path(os.fsdecode(self.name)), begin - skip, begin + len(target)):
            wanted = block[skip:][: len(target) - done]
            target[done : done + len(wanted)] = wanted
            done += len(wanted)
            skip = 0
        self.seek(begin + done)
        return done


class StreamedWriter:
    """A new append-only file that is written to disk one block at a time.

    While a thread writes one block, the next is filled. If the file system requires the cache, each block is flushed
    and dropped from it at once. Either way nothing remains to be flushed at the end, and reading the file back to
    verify it reads the disk.
    """

    def __init__(self, path: Path) -> None:
        """Create the file, or empty it."""
        try:
            self._file = FileIO(path, "wb", opener=_open_directly)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = FileIO(path, "wb")
        self._blocks = [_take_block(), _take_block()]
        self._filled = 0
        self._length = 0
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def write(self, data: Any) -> int:
        """Append ``data``, any bytes-like object, and return the number of bytes.

        Raises:
            OSError: writing this or earlier data failed.
        """
        rest = memoryview(data).cast("B")
        length = len(rest)
        while rest:
            taken = min(len(rest), _BLOCK_BYTES - self._filled)
            self._blocks[0][self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == _BLOCK_BYTES:
                self._hand_over()
        self._length += length
        return length

    def flush(self) -> None:
        """Do nothing: only a full block can be written directly. ``torch.save`` asks for this method."""

    def tell(self) -> int:
        """Return the number of bytes appended so far."""
        return self._length

    def close(self) -> None:
        """Write the remaining data, wait until everything is on disk, and close the file.

        Raises:
            OSError: writing failed.
        """
        self._hand_over()
        self._wait()
        os.fsync(self._file.fileno())
        self._thread.shutdown()
        self._file.close()
        _idle_blocks.extend(self._blocks)

    def _hand_over(self) -> None:
        """Pass the filled part of the current block to the thread and switch to the other block."""
        self._wait()
        self._writing = self._thread.submit(self._write_block, self._blocks[0][: self._filled])
        self._blocks.reverse()
        self._filled = 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write_block(self, block: memoryview) -> None:
        if len(block) < _BLOCK_BYTES:  # the last block may end within a sector
            _leave_direct_mode(self._file)
        while block:
            try:
                block = block[self._file.write(block) :]
            except OSError as error:  # the file system requires another alignment
                if error.errno != errno.EINVAL or not _leave_direct_mode(self._file):
                    raise
        if not _is_direct(self._file):
            os.fsync(self._file.fileno())
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _blocks_of(path: Path, start: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes between two positions, the first at a sector, in blocks; each is valid for one iteration.

    Ends early at the end of the file, and immediately if the file system has no direct access.
    """
    try:
        file = FileIO(path, "rb", opener=_open_directly)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return
    blocks = [_take_block(), _take_block()]

    def read(block: memoryview, position: int) -> memoryview:
        missing = -(-(end - position) // _SECTOR_BYTES) * _SECTOR_BYTES
        return block[: os.preadv(file.fileno(), [block[:missing]], position)]

    with file, ThreadPoolExecutor(max_workers=1) as thread:
        reading = thread.submit(read, blocks[0], start)
        for position in range(start, end, _BLOCK_BYTES):
            try:
                ready = reading.result()
            except OSError as error:  # the file system requires another alignment
                if error.errno != errno.EINVAL:
                    raise
                break
            blocks.reverse()
            if position + _BLOCK_BYTES < end:
                reading = thread.submit(read, blocks[0], position + _BLOCK_BYTES)
            yield ready
            if len(ready) < _BLOCK_BYTES:
                break
    _idle_blocks.extend(blocks)


def _take_block() -> memoryview:
    """Return a page-aligned block, as direct access requires."""
    try:
        return _idle_blocks.pop()
    except IndexError:
        return memoryview(mmap.mmap(-1, _BLOCK_BYTES, flags=mmap.MAP_PRIVATE))


def _open_directly(path: str, flags: int) -> int:
    return os.open(path, flags | _DIRECT, 0o666)


def _is_direct(file: FileIO) -> bool:
    return bool(fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & _DIRECT)


def _leave_direct_mode(file: FileIO) -> bool:
    """Write through the page cache from now on; return whether writes were direct before."""
    was_direct = _is_direct(file)
    fcntl.fcntl(file.fileno(), fcntl.F_SETFL, fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & ~_DIRECT)
    return was_direct
