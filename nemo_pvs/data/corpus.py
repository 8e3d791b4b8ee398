"""Reads documents from text, JSON-lines and Parquet files, folders of them, or the built-in Wikipedia sample."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from nemo_pvs.data import wikipedia
from nemo_pvs.data.compressed import DAMAGE, open_text
from nemo_pvs.errors import UserError
from nemo_pvs.system.progress import console

WIKIPEDIA_SAMPLE = "wikipedia-sample"
"""Built-in corpus: 88 long articles, 2.7 million characters, CC BY-SA (``wikipedia.sample_articles``)."""

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet")
_PARQUET_ROWS = 1024
_BYTE_ORDER_MARK = "\ufeff"

# Text files that accompany a data set but are not part of it. JSON-lines and Parquet files with such names are data.
_ABOUT_THE_DATA = re.compile(
    r"(readme|licen[sc]es?|copying|copyright|notices?|citation|changelog|data(set)?[-_ ]?card)([-_. ].*)?\.txt",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Document:
    """One text, which a split never divides and which an end-of-text token follows."""

    text: str
    id: str
    """Its origin, for messages: file and line or row, or the article's title."""


class BlankFilter:
    """Skips documents whose text is null or blank, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def apply(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents with text."""
        for document in documents:
            if document.text.strip():
                yield document
            else:
                self.count += 1


def report_blank(count: int) -> None:
    """Print the number of documents without text, if there are any."""
    if count:
        were = "document without text was" if count == 1 else "documents without text were"
        console.print(f"{count:,} {were} skipped.", soft_wrap=True)


def read_documents(
    inputs: str | Path | Sequence[str | Path],
    *,
    text_key: str = "text",
    encoding: str = "utf-8",
    keep_blank: bool = False,
) -> Iterator[Document]:
    """Return the documents of one or several inputs in the given order; files of a folder are sorted by name.

    A ``.txt`` file is one document; so is each line of ``.jsonl``, ``.jsonl.gz`` (``.json.gz`` in C4) or
    ``.jsonl.zst`` and each row of ``.parquet``, with its text under ``text_key``. The name ``wikipedia-sample`` stands
    for the built-in corpus. Documents whose text is null or blank are skipped unless ``keep_blank``, and their number
    is printed at the end. Files are read lazily, but whether the inputs exist is checked at once, and the files of a
    folder that are not read are printed.

    Raises:
        UserError: an input is missing or of an unknown kind, a line is broken or has no text, or there is no text.
    """
    names = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    report_left_out(names)
    return _not_nothing(input_files(names), text_key, encoding, ", ".join(map(str, names)), keep_blank)


def input_files(inputs: Sequence[str | Path]) -> list[Path | None]:
    """Return the input files in the order in which they are read; None stands for the built-in sample.

    For a folder these are all files of a known kind below it, except hidden ones, those in hidden folders, and
    ``README.txt``, ``LICENSE.txt`` and similar. A file given by name is read whatever its name.

    Raises:
        UserError: an input is missing or of an unknown kind.
    """
    return [source for name in inputs for source in _sources(name)]


def report_left_out(inputs: Sequence[str | Path]) -> None:
    """Print a line for every input folder with files that are not read."""
    for folder in [Path(name) for name in inputs if Path(name).is_dir()]:
        left_out = [file for file in _files_below(folder) if not _is_text(file, folder)]
        if left_out:
            few = ", ".join(str(file.relative_to(folder)) for file in left_out[:3])
            more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
            console.print(f"{folder}: not read as text: {few}{more}.", soft_wrap=True)


def _sources(name: str | Path) -> list[Path | None]:
    """Return the files of an input; None stands for the built-in sample."""
    path = Path(name)
    if str(name) == WIKIPEDIA_SAMPLE:
        return [None]
    if path.is_dir():
        files: list[Path | None] = [file for file in _files_below(path) if _is_text(file, path)]
        if not files:
            raise UserError(f"{path} contains no {', '.join(_SUFFIXES)} file; give the folder with the texts.")
        return files
    if not path.exists():
        raise UserError(f"{path} does not exist; give a text file, a folder of them, or the name {WIKIPEDIA_SAMPLE}.")
    if not path.name.endswith(_SUFFIXES):
        raise UserError(f"{path} cannot be read as text; give a file of one of the types {', '.join(_SUFFIXES)}.")
    return [path]


def _files_below(folder: Path) -> list[Path]:
    """Return all files below a folder in the order of their paths, those in linked folders included.

    Raises:
        UserError: a folder cannot be read, or a link that is not hidden leads nowhere, so that texts may be missing.
    """
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):  # rglob does not follow links
        above = Path(parent).parents[: len(Path(parent).relative_to(folder).parts)]
        if os.path.realpath(parent) in map(os.path.realpath, above):  # a link that leads back
            folders.clear()
        else:
            files += (Path(parent, name) for name in names)
    for file in files:
        if not file.exists() and not _is_hidden(file, folder):
            raise UserError(f"{file} is a link to {os.readlink(file)}, which does not exist; restore or remove it.")
    return [file for file in sorted(files) if file.is_file()]


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}); check its permissions.")


def _is_text(file: Path, folder: Path) -> bool:
    """Return whether a file of a folder is part of its text."""
    is_about_data = _ABOUT_THE_DATA.fullmatch(file.name)
    return file.name.endswith(_SUFFIXES) and not _is_hidden(file, folder) and not is_about_data


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _not_nothing(
    sources: list[Path | None], text_key: str, encoding: str, names: str, keep_blank: bool
) -> Iterator[Document]:
    blank = BlankFilter()
    empty = True
    try:
        for source in sources:
            documents = read_file(source, text_key, encoding)
            for document in documents if keep_blank else blank.apply(documents):
                empty = empty and not document.text.strip()
                yield document
    finally:  # even if the reader stops before the end
        report_blank(blank.count)
    if empty:
        raise UserError(f"{names} contains no text at all; give a corpus with at least one document.")


def read_file(
    source: Path | None, text_key: str, encoding: str = "utf-8", *, start: int = 0, end: int | None = None
) -> Iterator[Document]:
    """Yield the documents of one of ``input_files``, including blank ones; a null text becomes an empty one.

    Byte order marks are removed. ``start`` and ``end`` select a part of the file: row groups of a Parquet file, and
    of JSON lines the bytes that ``open_text`` describes.

    Raises:
        UserError: the file is damaged or truncated, or a line has no text.
    """
    if source is None:
        for title, text in wikipedia.sample_articles():
            yield Document(text, title)
    elif source.suffix == ".txt":
        yield _text_file(source, encoding)
    elif source.suffix == ".parquet":
        yield from _parquet_rows(source, text_key, start, end)
    else:
        yield from _json_lines(source, text_key, encoding, start, end)


def _text_file(path: Path, encoding: str) -> Document:
    try:
        return Document(path.read_text(encoding).removeprefix(_BYTE_ORDER_MARK), path.name)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {_not_decoded(error, f'byte {error.start}', encoding)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the file.") from None


def _json_lines(path: Path, text_key: str, encoding: str, start: int, end: int | None) -> Iterator[Document]:
    name = f"{path.name} from byte {start}" if start else path.name
    number = 0
    try:
        with open_text(path, encoding, start, end) as file:
            for number, line in enumerate(file, start=1):
                # A mark can also be inside a file that was concatenated from several files.
                record = line.removeprefix(_BYTE_ORDER_MARK)
                if record.strip():
                    yield Document(_text_of_line(record, text_key), f"{name}:{number}")
    except _LineError as error:
        raise UserError(f"{path}, line {_lines_before(path, start) + number}{error}") from None
    except UnicodeDecodeError as error:
        location = f"after line {_lines_before(path, start) + number}"
        raise UserError(f"{path} {_not_decoded(error, location, encoding)}") from None
    except EOFError as error:
        number += _lines_before(path, start)
        raise UserError(f"{path} is truncated after line {number} ({error}); download it again.") from None
    except DAMAGE as error:
        number += _lines_before(path, start)
        raise UserError(
            f"{path} cannot be read after line {number} ({error}); it may be damaged or truncated, download it again."
        ) from None


def _lines_before(path: Path, start: int) -> int:
    """Return the number of lines before a part of a file, which is known only after reading them."""
    if not start:
        return 0
    with open_text(path, "latin-1", 0, start) as file:
        return sum(1 for _ in file)


def _not_decoded(error: UnicodeDecodeError, location: str, encoding: str) -> str:
    """Return the end of a message that begins with the file's path."""
    if error.reason == "unexpected end of data":
        return f"ends in the middle of a character ({location}); it may be truncated, download it again."
    return f"is not {encoding} text ({location}: {error.reason}); convert it to {encoding}."


class _LineError(Exception):
    """What is wrong with a line, as a message continues after its number."""


def _text_of_line(line: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        advice = (
            "correct or remove the line"
            if line.endswith("\n")
            else "it has no line break at its end, so the file may be truncated: download it again, or remove the line"
        )
        raise _LineError(f", is not valid JSON ({reason}); {advice}.") from None
    if not isinstance(record, dict):
        raise _LineError(f", is not a JSON object; each line must read like {{{json.dumps(text_key)}: ...}}.")
    if text_key not in record:
        raise _LineError(f", has no key {text_key!r}; {_suggestion(text_key, list(record))}.")
    text = record[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _LineError(f": {text_key!r} is {type(text).__name__}, not text; name the key with the text.")
    # JSON can contain a lone surrogate (\ud800), which is not a character: it becomes U+FFFD, as in any UTF-8 reader.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _suggestion(key: str, present: list[Any]) -> str:
    names = [str(name) for name in present]
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    return f"did you mean {nearest[0]!r} (there are {', '.join(names)})" if nearest else "it has no keys at all"


def _parquet_rows(path: Path, text_key: str, start: int, end: int | None) -> Iterator[Document]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            _check_column(table.schema_arrow, text_key, path)
            groups = range(table.num_row_groups)
            row = sum(table.metadata.row_group(group).num_rows for group in groups[:start])
            for batch in table.iter_batches(_PARQUET_ROWS, row_groups=groups[start:end], columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield Document(text or "", f"{path.name}:{row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        fault = f"cannot be read after row {row}" if row else "is not a complete Parquet file"
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} {fault} ({reason}); it may be damaged or truncated, download it again.") from None


def _check_column(schema: pyarrow.Schema, text_key: str, path: Path) -> None:
    if text_key not in schema.names:
        raise UserError(f"{path} has no column {text_key!r}; {_suggestion(text_key, schema.names)}.")
    column = schema.field(text_key).type
    if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
        raise UserError(f"{path}: column {text_key!r} is {column}, not text; name the column with the text.")
