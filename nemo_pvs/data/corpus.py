"""Documents out of text, JSON-lines and Parquet files, folders of them, or the built-in Wikipedia sample."""

from __future__ import annotations

import difflib
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from nemo_pvs.data import wikipedia
from nemo_pvs.errors import UserError

WIKIPEDIA_SAMPLE = "wikipedia-sample"
"""Built-in corpus: 88 long articles, 2.7 million characters, CC BY-SA (``wikipedia.sample_articles``)."""

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet")
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """One text, kept whole: a split never cuts it, and an end-of-text token follows it."""

    text: str
    id: str
    """Where it comes from, for messages: file and line or row, or the article's title."""


def read_documents(
    inputs: str | Path | Sequence[str | Path],
    *,
    text_key: str = "text",
    encoding: str = "utf-8",
    keep_blank: bool = False,
) -> Iterator[Document]:
    """Return the documents of one input or several, in the order given; a folder's files in order of their names.

    A ``.txt`` file is one document; a line of ``.jsonl``, ``.jsonl.gz`` (``.json.gz`` in C4) or ``.jsonl.zst`` and a
    row of ``.parquet`` are one each, their text under ``text_key``. The name ``wikipedia-sample`` needs no file. Blank
    documents are skipped unless ``keep_blank``. Files are read as the documents are asked for; that the inputs exist
    is checked at once.

    Raises:
        UserError: an input is missing or of an unknown kind, a line is broken or has no text, or nothing is there.
    """
    names = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    return _not_nothing(input_files(names), text_key, encoding, ", ".join(map(str, names)), keep_blank)


def input_files(inputs: Sequence[str | Path]) -> list[Path | None]:
    """Return the files that inputs stand for, in the order of reading; None is the built-in sample.

    Raises:
        UserError: an input is missing or of an unknown kind.
    """
    return [source for name in inputs for source in _sources(name)]


def _sources(name: str | Path) -> list[Path | None]:
    """Return the files that an input stands for; None is the built-in sample."""
    path = Path(name)
    if str(name) == WIKIPEDIA_SAMPLE:
        return [None]
    if path.is_dir():
        files: list[Path | None] = [
            file for file in sorted(path.rglob("*")) if file.is_file() and file.name.endswith(_SUFFIXES)
        ]
        if not files:
            raise UserError(f"{path} holds no {', '.join(_SUFFIXES)} file; point to the folder with the texts.")
        return files
    if not path.exists():
        raise UserError(f"{path} does not exist; give a text file, a folder of them, or the name {WIKIPEDIA_SAMPLE}.")
    if not path.name.endswith(_SUFFIXES):
        raise UserError(f"{path} is of no kind that can be read as text; known are {', '.join(_SUFFIXES)}.")
    return [path]


def _not_nothing(
    sources: list[Path | None], text_key: str, encoding: str, names: str, keep_blank: bool
) -> Iterator[Document]:
    empty = True
    for source in sources:
        for document in read_file(source, text_key, encoding):
            if keep_blank or document.text.strip():
                empty = empty and not document.text.strip()
                yield document
    if empty:
        raise UserError(f"{names} holds no text at all; give a corpus with at least one document.")


def read_file(source: Path | None, text_key: str, encoding: str = "utf-8") -> Iterator[Document]:
    """Yield the documents of one of ``input_files``, blank ones too.

    Raises:
        UserError: the file is damaged, or a line has no text.
    """
    if source is None:
        for title, text in wikipedia.sample_articles():
            yield Document(text, title)
        return
    try:
        if source.suffix == ".txt":
            yield Document(source.read_text(encoding), source.name)
        elif source.suffix == ".parquet":
            yield from _parquet_rows(source, text_key)
        else:
            yield from _json_lines(source, text_key, encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not {encoding} text (byte {error.start}: {error.reason}); convert it to {encoding}."
        ) from None


def _json_lines(path: Path, text_key: str, encoding: str) -> Iterator[Document]:
    number = 0
    try:
        with _open_text(path, encoding) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Document(_text_of_line(line, text_key, f"{path}, line {number}"), f"{path.name}:{number}")
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise UserError(
            f"{path} cannot be read after line {number} ({error}); it may be cut short, fetch it again."
        ) from None


def _open_text(path: Path, encoding: str) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding)
    if path.suffix == ".zst":
        return zstandard.open(path, "rt", encoding=encoding)
    return open(path, encoding=encoding)


def _text_of_line(line: str, text_key: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}, is not valid JSON ({error.msg}); mend or remove the line.") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}, is not a JSON object; each line must read like {{{json.dumps(text_key)}: ...}}.")
    if text_key not in record:
        raise UserError(f"{place}, has no key {text_key!r}; {_suggestion(text_key, list(record))}.")
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{place}: {text_key!r} is {type(text).__name__}, not text; name the key that holds the text.")
    # JSON can spell half a surrogate pair (\ud800), which is no character: it becomes U+FFFD, as in any UTF-8 reader.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _suggestion(key: str, present: list[Any]) -> str:
    names = [str(name) for name in present]
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    return f"did you mean {nearest[0]!r} (there are {', '.join(names)})" if nearest else "it has no keys at all"


def _parquet_rows(path: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file ({str(error).splitlines()[0]}); fetch it again.") from None
    with table:
        if text_key not in table.schema_arrow.names:
            raise UserError(f"{path} has no column {text_key!r}; {_suggestion(text_key, table.schema_arrow.names)}.")
        column = table.schema_arrow.field(text_key).type
        if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
            raise UserError(f"{path}: column {text_key!r} is {column}, not text; name the column that holds the text.")
        row = 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield Document(text or "", f"{path.name}:{row}")
