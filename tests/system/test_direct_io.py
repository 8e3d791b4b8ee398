from __future__ import annotations

import errno
import random

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.system import direct_io
from nemo_pvs.system.direct_io import StreamedReader, StreamedWriter
from nemo_pvs.system.files import disk_errors

BLOCK = 16 << 20
CONTENT = random.Random(0).randbytes(40 << 20)


@pytest.fixture(params=["direct", "cached"])
def access(request, monkeypatch):
    """Both ways to a disk: one that allows direct access, and one that refuses it."""
    if request.param == "cached":

        def refuse(path, flags):
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(direct_io, "_open_directly", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths",
    [[], [0], [5], [BLOCK], [BLOCK + 1], [1, BLOCK - 1, 4096], [7, 2 * BLOCK, 3], [1_000_003] * 20],
    ids=lambda lengths: f"{len(lengths)} pieces, {sum(lengths)} bytes",
)
def test_pieces_become_a_file(tmp_path, access, lengths):
    (tmp_path / "x").write_bytes(b"what was there before" * 1000)
    file = StreamedWriter(tmp_path / "x")
    begin = 0
    for length in lengths:
        assert file.tell() == begin
        assert file.write(CONTENT[begin : begin + length]) == length
        begin += length
    file.close()
    assert (tmp_path / "x").read_bytes() == CONTENT[:begin]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "length"),
    [
        (0, 10),
        (4096, BLOCK - 1),
        (0, BLOCK),
        (4095, BLOCK),
        (4097, BLOCK + 4095),
        (1234567, 2 * BLOCK + 1),
        (len(CONTENT) - 2 * BLOCK - 5, 2 * BLOCK + 5),
        (0, len(CONTENT)),
    ],
)
def test_any_piece_can_be_read(tmp_path, access, begin, length):
    (tmp_path / "x").write_bytes(CONTENT)
    target = bytearray(length)
    with StreamedReader(tmp_path / "x") as file:
        file.seek(begin)
        assert file.readinto(target) == length
        assert file.tell() == begin + length
        assert file.read(5) == CONTENT[begin + length :][:5]
    assert target == CONTENT[begin : begin + length]


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, BLOCK, BLOCK + 4096, BLOCK + 5000])
def test_a_file_that_ends_early(tmp_path, access, size):
    (tmp_path / "x").write_bytes(CONTENT[:size])
    target = bytearray(2 * BLOCK)
    with StreamedReader(tmp_path / "x") as file:
        assert file.readinto(target) == size
        assert file.tell() == size
        file.seek(3)
        assert file.readinto(target) == max(size - 3, 0)
    assert target.startswith(CONTENT[3:size])


def test_files_share_their_blocks_one_after_the_other(tmp_path):
    for index in range(5):
        file = StreamedWriter(tmp_path / str(index))
        file.write(CONTENT[: BLOCK + index])
        file.close()
        target = bytearray(BLOCK + index)
        with StreamedReader(tmp_path / str(index)) as file:
            file.readinto(target)
        assert target == CONTENT[: BLOCK + index]
    assert len(direct_io._idle_blocks) == len({id(block.obj) for block in direct_io._idle_blocks})


@pytest.mark.parametrize("size", [10, 3 * BLOCK])
def test_a_full_disk_is_told(tmp_path, size):
    (tmp_path / "x").symlink_to("/dev/full")

    def fill():
        file = StreamedWriter(tmp_path / "x")
        file.write(CONTENT[:size])
        file.close()

    with pytest.raises(UserError, match="the disk is full"), disk_errors(tmp_path / "x"):
        fill()


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        StreamedReader(tmp_path / "x")
