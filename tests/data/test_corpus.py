from __future__ import annotations

import errno
import gzip
import io
import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nemo_pvs.data.corpus import Document, input_files, read_documents, read_file
from nemo_pvs.errors import UserError

from .conftest import needs_wikipedia_sample

TEXTS = ["one\n\ntwo", "drei – äöü", "four\u2028five"]


def _lines(texts: list[str], key: str = "text") -> str:
    return "".join(json.dumps({"id": 1, key: text}, ensure_ascii=False) + "\n" for text in texts)


def _write_jsonl(path: Path) -> None:
    path.write_text(_lines(TEXTS))


def _write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(_lines(TEXTS).encode()))


def _write_zst(path: Path) -> None:
    path.write_bytes(zstandard.compress(_lines(TEXTS).encode()))


def _write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", _write_jsonl), ("a.jsonl.gz", _write_gz), ("a.jsonl.zst", _write_zst), ("a.parquet", _write_parquet)],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert list(read_documents(tmp_path / name)) == [Document(text, f"{name}:{i}") for i, text in enumerate(TEXTS, 1)]


def test_a_folder_is_read_in_order_of_names_and_several_inputs_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "b.txt").write_text("b")
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "deep" / "c.txt").write_text("c")
    (tmp_path / "folder" / "README.md").write_text("no corpus")
    (tmp_path / "z.txt").write_text("z")
    documents = read_documents([tmp_path / "z.txt", str(tmp_path / "folder")])
    assert [document.text for document in documents] == ["z", "a", "b", "c"]


def test_a_text_file_is_one_document_and_blank_documents_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n")
    (tmp_path / "b.txt").write_text(" \n\t\n")
    assert [document.text for document in read_documents(tmp_path)] == ["one\n\n\ntwo\n"]


def test_another_key_and_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(["grün"], key="content").encode("latin-1"))
    documents = read_documents(path, text_key="content", encoding="latin-1")
    assert [document.text for document in documents] == ["grün"]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert [document.text for document in read_documents(path)] == ["a\ufffdb 😀"]


def test_missing_inputs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt does not exist"):
        read_documents(tmp_path / "absent.txt")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a.pdf cannot be read as text; .* types \.txt"):
        read_documents(tmp_path / "a.pdf")
    with pytest.raises(UserError, match=r"contains no \.txt"):
        read_documents(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3, is not valid JSON"),
        ('{"text": "a"}\n["b"]\n', r"line 2, is not a JSON object"),
        ('{"id": 1, "Text": "a"}\n', r"line 1, has no key 'text'; did you mean 'Text' \(there are id, Text\)"),
        ("{}\n", r"line 1, has no key 'text'; it has no keys at all"),
        ('{"text": 1}\n', r"line 1: 'text' is int, not text"),
        ('{"text": null}\n', r"a\.jsonl contains no text at all"),
        ('{"text": "a"}\n{"text": "b', r"line 2, is not valid JSON .* the file may be truncated: download it again"),
        ('{"text": "a", "id": ' + "1" * 5000 + "}\n", r"line 1, is not valid JSON \(Exceeds the limit"),
        ('{"text": "a", "id": ' + "[" * 10000 + "\n", r"line 1, is not valid JSON \(maximum recursion depth"),
        ('{"text": "  "}\n', r"a\.jsonl contains no text at all"),
        ("", r"a\.jsonl contains no text at all"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(path))


def test_documents_before_a_broken_line_are_still_given(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{')
    documents = read_documents(path)
    assert next(documents).text == "a"
    with pytest.raises(UserError, match="line 2"):
        next(documents)


def test_wrong_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not utf-8 text \(byte 2"):
        list(read_documents(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl.zst").write_bytes(b"no zstandard frame")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read after line"):
        list(read_documents(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"a\.parquet is not a complete Parquet file"):
        list(read_documents(tmp_path / "a.parquet"))


def _gz_members(first: bytes, second: bytes) -> list[bytes]:
    return [gzip.compress(first), gzip.compress(second)]


def _zst_frames(first: bytes, second: bytes) -> list[bytes]:
    skippable = struct.pack("<II", 0x184D2A50, 3) + b"abc"
    flushed = io.BytesIO()
    with zstandard.ZstdCompressor(write_checksum=True).stream_writer(flushed, closefd=False) as writer:
        for line in first.splitlines(keepends=True):  # a block for every line, as loggers write
            writer.write(line)
            writer.flush(zstandard.FLUSH_BLOCK)
    return [skippable, flushed.getvalue(), skippable, zstandard.compress(second), skippable]


@pytest.mark.parametrize(("name", "frames"), [("a.jsonl.gz", _gz_members), ("a.jsonl.zst", _zst_frames)])
def test_a_compressed_file_is_read_to_its_last_frame_or_refused_wherever_it_is_cut(
    tmp_path: Path, name: str, frames: Callable[[bytes, bytes], list[bytes]]
) -> None:
    path = tmp_path / name
    parts = frames(_lines(TEXTS).encode(), _lines(["six"]).encode())
    whole = b"".join(parts)
    path.write_bytes(whole)
    assert [document.text for document in read_documents(path)] == [*TEXTS, "six"]
    boundaries = set(itertools.accumulate(len(part) for part in parts))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length in boundaries:  # nothing in the file says that there was more
            assert [document.text for document in read_file(path, "text")] in ([], TEXTS, [*TEXTS, "six"])
        else:
            with pytest.raises(UserError, match=rf"{name} (is truncated after line|cannot be read after line)"):
                list(read_file(path, "text"))
    for length in boundaries:
        if length < len(parts[0]) + len(parts[1]):
            continue
        path.write_bytes(whole[: length - 1])
        with pytest.raises(UserError, match=rf"{name} is truncated after line \d \(.+\); download it again"):
            list(read_file(path, "text"))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_complete_frame_that_ends_inside_a_line_may_be_cut_short(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    path.write_bytes(compress(_lines(TEXTS).encode()[:-3]))
    with pytest.raises(UserError, match=r"line 3, is not valid JSON .* may be truncated"):
        list(read_documents(path))


def test_a_frame_with_a_long_window_is_read(tmp_path: Path) -> None:
    """As ``zstd --long=30`` writes it."""
    settings = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(_lines(TEXTS).encode()) + compressor.flush())
    assert [document.text for document in read_documents(tmp_path / "a.jsonl.zst")] == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_ends_inside_a_character_may_be_cut_short(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "a"}\n{"text": "ä'.encode()[:-1])
    with pytest.raises(UserError, match=r"ends in the middle of a character .* may be truncated"):
        list(read_documents(path))


def test_a_parquet_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _write_parquet(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.parquet is not a complete Parquet file"):
            list(read_documents(path))


def test_a_damaged_page_of_a_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"document {i}" for i in range(50)]})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, compression="none")
    damaged = path.read_bytes().replace(b"document 7", b"document 8")
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet .*could not verify page integrity.*download it again"):
        list(read_documents(path))


BYTE_ORDER_MARK = "\ufeff".encode()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BYTE_ORDER_MARK + b"Hello")
    marked = BYTE_ORDER_MARK + b'{"text": "Hello"}\n'
    (tmp_path / "b.jsonl").write_bytes(marked * 2)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(marked) * 2)
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(marked) * 2)
    assert [document.text for document in read_documents(tmp_path)] == ["Hello"] * 7


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_documents_without_text_are_skipped_and_counted_in_every_format(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a", None, "", " \n", "b"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(lines))
    assert [document.text for document in read_documents([path, path])] == ["a", "b", "a", "b"]
    assert capsys.readouterr().out == "6 documents without text were skipped.\n"


def test_of_a_folder_only_text_is_read_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_text = [
        *("._a.txt", ".gitattributes", ".hidden.jsonl", ".cache/huggingface/b.txt", "deep/.git/c.txt", "README.md"),
        *("README.txt", "deep/readme.en.txt", "LICENSE.txt", "Licence-CC.txt", "NOTICE.txt", "dataset_card.txt"),
    ]
    text = ["a.txt", "deep/readmission.txt", "licenses.jsonl", "notices.jsonl"]
    for name in [*no_text, *text]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a"}\n')
    assert input_files([tmp_path]) == [tmp_path / name for name in text]
    assert len(list(read_documents(tmp_path))) == len(text)
    assert capsys.readouterr().out.startswith(f"{tmp_path}: not read as text: ._a.txt, .cache/huggingface/b.txt, ")
    assert input_files([tmp_path / "README.txt"]) == [tmp_path / "README.txt"]  # it is asked for


def test_linked_folders_are_read_and_links_that_lead_back_are_not(tmp_path: Path) -> None:
    """On a cluster, a folder of links is how a data set on several disks is put together."""
    for name in ("disk/one/a.txt", "disk/two/b.txt", "data/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    data = tmp_path / "data"
    (data / "one").symlink_to(tmp_path / "disk" / "one")
    (data / "two").symlink_to(Path("..", "disk", "two"))
    (data / "two" / "again").symlink_to(data)
    (data / ".missing").symlink_to(tmp_path / "disk" / "three")
    (tmp_path / "link").symlink_to(data)
    for folder in (data, tmp_path / "link"):
        assert input_files([folder]) == [folder / name for name in ("c.txt", "one/a.txt", "two/b.txt")]


@pytest.mark.parametrize("name", ["three", "two/d.jsonl"])
def test_what_cannot_be_reached_is_not_silently_missing(tmp_path: Path, name: str) -> None:
    """As when a disk is not mounted: the corpus would be smaller than it should be."""
    (tmp_path / "two").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{name} is a link to .*elsewhere, which does not exist"):
        read_documents(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_silently_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    real = os.scandir

    def scandir(path: Path) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\)"):
        input_files([tmp_path])


def test_a_parquet_column_must_be_there_and_be_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["a", None], "number": [1, 2]}), path)
    with pytest.raises(UserError, match=r"has no column 'text'; did you mean 'texts'"):
        list(read_documents(path))
    with pytest.raises(UserError, match=r"column 'number' is int64, not text"):
        list(read_documents(path, text_key="number"))
    assert [document.text for document in read_documents(path, text_key="texts")] == ["a"]


@needs_wikipedia_sample
def test_the_wikipedia_sample_is_read_by_its_name() -> None:
    first = next(read_documents("wikipedia-sample"))
    assert first.id == "Anarchism"
    assert first.text.startswith("Anarchism is a political philosophy")
