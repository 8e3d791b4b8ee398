"""Draws calibration sets exactly as the reference implementations do, from local copies of the texts.

Each loader is an entry of ``LOADERS``: how much of the text is read, how it is joined, and where windows start. Random
draws are those of Python's ``random`` after ``random.seed(seed)``, so equal texts yield equal tokens.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from nemo_pvs.data.corpus import read_documents
from nemo_pvs.data.token_set import TokenSet, check_window_size
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class ReferenceLoader:
    """How a reference implementation turns a text into windows."""

    text: str
    """The text that the reference reads; with the same text, the tokens are the same."""
    windows: Literal["consecutive", "random", "documents"]
    """consecutive: in sequence from the start; random: anywhere in the joined text; documents: one window from each of
    randomly drawn documents that are long enough."""
    rows: int | None = None
    """Number of rows to read from the start of the text; None reads all."""
    separator: str = ""
    """Inserted between the rows when they are joined."""
    text_key: str = "text"
    """Key or column of the text."""


LOADERS = {
    "c4_random_docs": ReferenceLoader("allenai/c4, en, train shard 00000 of 01024 (Wanda, SparseGPT)", "documents"),
    "wikitext2_random": ReferenceLoader("wikitext-2-raw-v1, train (FLAP)", "random", separator=" "),
    "wikitext103_seq": ReferenceLoader("wikitext-103-v1, train (Minitron)", "consecutive", 131072, "\n\n"),
    "wikitext2_seq": ReferenceLoader("wikitext-2-raw-v1, train (Minitron)", "consecutive", separator="\n\n"),
    "c4_seq": ReferenceLoader("allenai/c4, en, train shard 00000 of 01024 (Minitron)", "consecutive", 8000, " "),
    "cnn_dailymail_seq": ReferenceLoader("cnn_dailymail 3.0.0, train (Minitron)", "consecutive", 8000, " ", "article"),
}
"""The loaders of Wanda, SparseGPT, FLAP and Minitron in llm-pruning-collection, by name."""


def load_tokens(
    loader: str,
    files: str | Path | Sequence[str | Path],
    tokenizer_folder: Path,
    *,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    context: int | None = None,
) -> TokenSet:
    """Draw a calibration set as a reference does.

    Args:
        loader: Name in ``LOADERS``.
        files: Local copies of its text, as for ``read_documents``; a line of a ``.txt`` file is a row.
        tokenizer_folder: Folder with the model's tokenizer, which adds its default special tokens.
        samples: Number of windows (N).
        sequence_length: Tokens per window (S).
        seed: Seed of Python's ``random``; not used for consecutive windows.
        context: The model's context (``max_position_embeddings``); longer windows are refused. None does not check.

    Raises:
        UserError: there is no such loader, the files cannot be read, windows are longer than the context, or the text
            is too short for the number of windows.
    """
    if loader not in LOADERS:
        raise UserError(f"There is no loader {loader!r}; choose {', '.join(LOADERS)}.")
    if context is not None and sequence_length > context:
        raise UserError(
            f"Sequences of {sequence_length} tokens do not fit the model's context of {context}; choose shorter ones."
        )
    settings = LOADERS[loader]
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = list(islice(read_rows(files, settings.text_key), settings.rows))
    return cut(
        loader,
        rows,
        lambda text: tokenizer(text, verbose=False)["input_ids"],
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        tokenizer_sha256=tokenizer_hash(tokenizer_folder),
    )


def read_rows(files: str | Path | Sequence[str | Path], text_key: str = "text") -> Iterator[str]:
    """Yield the rows of a data set, including blank ones, as in the ``datasets`` library.

    A ``.txt`` file is read like WikiText's: each line is a row with its line break, a blank line an empty row.

    Raises:
        UserError: as ``read_documents``.
    """
    for document in read_documents(files, text_key=text_key, keep_blank=True):
        if document.id.endswith(".txt"):
            yield from (line if line.strip() else "" for line in io.StringIO(document.text))
        else:
            yield document.text


def cut(
    loader: str,
    rows: Sequence[str],
    tokenize: Tokenize,
    *,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    tokenizer_sha256: str | None = None,
) -> TokenSet:
    """Cut windows from rows of text as the reference does.

    In addition to the entries of ``TokenSet``, the manifest has the ``loader``, the number of ``rows`` read and, for
    randomly drawn documents, the number of ``draws`` needed to find long enough ones.

    Args:
        loader: Name in ``LOADERS``.
        rows: The text, row by row; only the loader's first ``rows`` are read.
        tokenize: Turns a text into ids, with its default special tokens.
        samples: Number of windows (N).
        sequence_length: Tokens per window (S).
        seed: Seed of Python's ``random``.
        tokenizer_sha256: Hash of the tokenizer's files, for the manifest.

    Raises:
        UserError: the text is too short for the number of windows.
    """
    settings = LOADERS[loader]
    rows = rows[: settings.rows]
    if settings.windows == "documents":
        return _document_windows(loader, rows, tokenize, samples, sequence_length, seed, tokenizer_sha256)
    tokens = TokenSet.from_documents(
        rows,
        tokenize,
        separator=settings.separator,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed if settings.windows == "random" else None,
        data_set=loader,
        tokenizer_sha256=tokenizer_sha256,
    )
    return TokenSet(tokens.ids, {**tokens.manifest, "loader": loader, "rows": len(rows)})


def _document_windows(
    loader: str,
    documents: Sequence[str],
    tokenize: Tokenize,
    samples: int,
    sequence_length: int,
    seed: int,
    tokenizer_sha256: str | None,
) -> TokenSet:
    """Draw each window from a randomly drawn document, redrawing documents that are not longer than a window."""
    check_window_size(samples, sequence_length)
    generator = random.Random(seed)
    short: set[int] = set()
    windows: list[Sequence[int]] = []
    draws = 0
    while len(windows) < samples:
        # The reference would loop forever.
        if len(short) == len(documents):
            raise UserError(
                f"None of the {len(documents)} documents for {loader} has more than {sequence_length} tokens; "
                "choose a shorter sequence_length, or longer documents."
            )
        drawn = generator.randint(0, len(documents) - 1)
        draws += 1
        if drawn in short:
            continue
        ids = tokenize(documents[drawn])
        if len(ids) <= sequence_length:
            short.add(drawn)
            continue
        start = generator.randint(0, len(ids) - sequence_length - 1)
        windows.append(ids[start : start + sequence_length])
    return TokenSet.from_windows(
        windows,
        data_set=loader,
        source_sha256=_hash_texts(documents),
        tokenizer_sha256=tokenizer_sha256,
        seed=seed,
        loader=loader,
        rows=len(documents),
        draws=draws,
    )


def _hash_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()
