from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nemo_pvs.data.corpus import Document, read_documents
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
    with pytest.raises(UserError, match=r"a\.pdf is of no kind .* known are \.txt"):
        read_documents(tmp_path / "a.pdf")
    with pytest.raises(UserError, match=r"holds no \.txt"):
        read_documents(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3, is not valid JSON"),
        ('{"text": "a"}\n["b"]\n', r"line 2, is not a JSON object"),
        ('{"id": 1, "Text": "a"}\n', r"line 1, has no key 'text'; did you mean 'Text' \(there are id, Text\)"),
        ("{}\n", r"line 1, has no key 'text'; it has no keys at all"),
        ('{"text": null}\n', r"line 1: 'text' is NoneType, not text"),
        ('{"text": "  "}\n', r"a\.jsonl holds no text at all"),
        ("", r"a\.jsonl holds no text at all"),
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
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_lines(TEXTS * 200).encode())[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read after line"):
        list(read_documents(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.jsonl.zst").write_bytes(b"no zstandard frame")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read after line"):
        list(read_documents(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file"):
        list(read_documents(tmp_path / "a.parquet"))


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
