from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nemo_pvs.data.compressed import frame_starts, open_text
from nemo_pvs.data.corpus import Document, read_file
from nemo_pvs.data.parts import FilePart, divide
from nemo_pvs.errors import UserError

# A byte order mark, characters of several bytes, blank lines, all kinds of line breaks, a line longer than a part.
LINES = [
    "\ufeff" + json.dumps({"text": "first"}) + "\n",
    json.dumps({"text": "zwei – 😀"}, ensure_ascii=False) + "\r\n",
    "\r\n",
    "\n",
    json.dumps({"text": "drei 😀" * 40}, ensure_ascii=False) + "\n",
    json.dumps({"text": None}) + "\r",
    json.dumps({"text": "fünf"}, ensure_ascii=False) + "\n",
    json.dumps({"text": "six"}),
]


def _texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def _read(part: FilePart) -> list[Document]:
    return list(read_file(part.file, "text", start=part.start, end=part.end))


@pytest.mark.parametrize("last", ["", "\n", "\r\n"])
def test_wherever_a_file_is_divided_every_line_is_read_once(tmp_path: Path, last: str) -> None:
    path = tmp_path / "a.jsonl"
    content = ("".join(LINES) + last).encode()
    path.write_bytes(content)
    whole = _texts(_read(FilePart(path)))
    assert len(whole) == 6
    for cut in range(1, len(content)):
        parts = [FilePart(path, 0, cut), FilePart(path, cut)]
        assert [text for part in parts for text in _texts(_read(part))] == whole, cut
    for size in (1, 2, 7, 50):
        parts = divide([path], size)
        assert len(parts) == -(-len(content) // size)
        assert [text for part in parts for text in _texts(_read(part))] == whole, size


def _frame(content: bytes, generator: random.Random) -> bytes:
    compressor = zstandard.ZstdCompressor(
        write_checksum=generator.random() < 0.5, write_content_size=generator.random() < 0.5
    )
    if generator.random() < 0.3:
        return bytes([0x50 + generator.randrange(16)]) + b"\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    return compressor.compress(content)


@pytest.mark.parametrize("seed", range(10))
def test_frames_may_begin_anywhere(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    path = tmp_path / "a.jsonl.zst"
    content = "\n".join("".join(LINES) for _ in range(3)).encode()
    frames, position = [], 0
    while position < len(content):
        frame = _frame(content[position : position + 40], generator)
        frames.append(frame)
        if frame.startswith(zstandard.FRAME_HEADER):
            position += 40
    path.write_bytes(b"".join(frames))
    starts = frame_starts(path)
    assert starts == [sum(map(len, frames[:index])) for index in range(len(frames))]
    whole = _texts(_read(FilePart(path)))
    assert len(whole) == 18
    for least in (1, 100, 300):
        parts = divide([path], least)
        assert len(parts) == len(frames) or least > 1
        assert [text for part in parts for text in _texts(_read(part))] == whole
    (tmp_path / "plain").write_bytes(content)
    with open_text(path, "utf-8") as file:
        assert file.read() == (tmp_path / "plain").read_text()


@pytest.mark.parametrize("size", [0, 1, 1 << 17, 300_000])
@pytest.mark.parametrize("repeated", [True, False])
def test_frames_of_every_kind_of_block_are_found(tmp_path: Path, size: int, repeated: bool) -> None:
    """Run-length blocks, raw ones, and several blocks."""
    content = b"a" * size if repeated else random.Random(0).randbytes(size)
    frames = [zstandard.ZstdCompressor(write_checksum=check).compress(content) for check in (True, False)]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert frame_starts(path) == [0, len(frames[0])]
    path.write_bytes(frames[0] + b"no frame")
    assert frame_starts(path) == [0, len(frames[0])]
    path.write_bytes(frames[0] + frames[1][:5])  # ends within a header
    assert frame_starts(path) == [0, len(frames[0])]
    path.write_bytes(frames[0][:-1])
    assert frame_starts(path) == [0]


def test_messages_count_the_lines_of_the_whole_file(tmp_path: Path) -> None:
    lines = "".join(LINES).encode()
    for name, content in [
        ("a.jsonl", lines + b"\n{broken\n"),
        ("a.jsonl.zst", zstandard.compress(lines) + zstandard.compress(b"\n{broken\n")),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        for least in (1, 60, 10_000):
            with pytest.raises(UserError, match=r"line 9, is not valid JSON \(Expecting property name"):
                [document for part in divide([path], least) for document in _read(part)]
    path.write_bytes(content[:-5])
    with pytest.raises(UserError, match="is truncated after line 8"):
        [document for part in divide([path], 1) for document in _read(part)]


def test_parquet_files_are_divided_between_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {row}" for row in range(25)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=4)
    parts = divide([path], 1)
    assert [(part.start, part.end) for part in parts] == [*((group, group + 1) for group in range(6)), (6, None)]
    assert [text for part in parts for text in _texts(_read(part))] == texts
    assert _read(parts[2])[0].id == "a.parquet:9"
    assert len(divide([path], 10_000)) == 1
    path.write_bytes(path.read_bytes()[:-3])
    assert divide([path], 1) == [FilePart(path)]


def test_what_cannot_be_divided_is_one_part(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl.gz", "b.txt", "c.jsonl")]
    for file in files:
        file.write_bytes(b"x" * 100)
    assert divide([None, *files], 60) == [
        FilePart(None),
        FilePart(files[0]),
        FilePart(files[1]),
        FilePart(files[2], 0, 60),
        FilePart(files[2], 60),
    ]
    assert len(divide(files)) == 3, "small files are not divided"
