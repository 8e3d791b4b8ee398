"""The texts on which perplexity is reported, cut into windows whose kind is reported with the number."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nemo_pvs.data.corpus import read_documents
from nemo_pvs.data.reference_sets import read_rows
from nemo_pvs.data.token_files import check_tokenizer
from nemo_pvs.data.token_set import TokenSet, check_window_size, read_token_file
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import sha256_bytes, sha256_file


@dataclass(frozen=True)
class NamedText:
    """A text from the Hugging Face Hub, as ``hf download`` stores it."""

    repository: str
    file: str
    """File of held-out text."""
    train_file: str
    """First file of training text, which the published evaluation of arXiv 2606.14150 reads instead."""
    separator: str
    """Text inserted between rows."""
    rows: int | None = None
    """Number of rows to read from the start; None for all."""
    train_rows: int | None = None
    text_key: str = "text"


TEXTS = {
    "c4": NamedText(
        "allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "en/c4-train.00000-of-01024.json.gz", " ", 8000, 8000
    ),
    # The test split is the same for WikiText-2 and WikiText-103; the published evaluation reads WikiText-103.
    "wikitext": NamedText(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        "wikitext-103-v1/train-00000-of-00002.parquet",
        "\n\n",
        train_rows=32768,
    ),
    "cnn_dailymail": NamedText(
        "abisee/cnn_dailymail",
        "3.0.0/test-00000-of-00001.parquet",
        "3.0.0/train-00000-of-00003.parquet",
        " ",
        8000,
        8000,
        "article",
    ),
}
"""Texts by their names in ``pvs evaluate --perplexity``."""


def windows_of(
    text: str,
    tokenizer_folder: Path,
    *,
    samples: int,
    sequence_length: int,
    stride: int | None = None,
    train_split: bool = False,
    data: Path = Path("task_data"),
) -> TokenSet:
    """Tokenise a text as a whole and cut windows from its start.

    Windows are consecutive (``stride`` None), or begin every ``stride`` tokens and so overlap. The manifest records
    this under ``cut``.

    Args:
        text: A name in ``TEXTS``, or files as ``read_documents`` takes them (documents joined by blank lines), or the
            ``.bin`` file of a Megatron token file.
        tokenizer_folder: The model's tokenizer; it adds its special tokens once, at the beginning of the text.
        samples: Maximum number of windows.
        sequence_length: Tokens per window.
        stride: Tokens from the start of one window to the start of the next.
        train_split: Read the training text, as the published evaluation does, to compare with its numbers.
        data: Folder with the named texts, one subfolder per repository.

    Raises:
        UserError: the text is missing, shorter than one window or in the tokens of another tokenizer, or a number is
            invalid.
    """
    check_windows(samples, sequence_length, stride)
    if train_split and text not in TEXTS:
        raise UserError(f"--compat is for {', '.join(TEXTS)}; leave it out for {text}.")
    if text.endswith(".bin"):
        prefix = Path(text.removesuffix(".bin"))
        check_tokenizer(prefix, tokenizer_hash(tokenizer_folder))
        stream, source = read_token_file(prefix), sha256_file(Path(text))
    else:
        if text in TEXTS:
            joined = _named_text(TEXTS[text], data, train_split)
        else:
            joined = "\n\n".join(document.text for document in read_documents(text))
        stream, source = (
            load_tokenizer(tokenizer_folder)(joined, verbose=False)["input_ids"],
            sha256_bytes(joined.encode()),
        )
    step = stride or sequence_length
    starts = range(0, len(stream) - sequence_length + 1, step)[:samples]
    if not starts:
        raise UserError(
            f"The text {text} has {len(stream):,} tokens, fewer than one window of {sequence_length}; use more text "
            "or a shorter sequence_length."
        )
    return TokenSet.from_windows(
        [stream[start : start + sequence_length] for start in starts],
        data_set=text,
        source_sha256=source,
        tokenizer_sha256=tokenizer_hash(tokenizer_folder),
        seed=None,
        cut=description(sequence_length, stride, train_split=train_split),
        stride=stride,
    )


def check_windows(samples: int, sequence_length: int, stride: int | None) -> None:
    """Check the sizes of ``windows_of``.

    Raises:
        UserError: a number is invalid.
    """
    check_window_size(samples, sequence_length)
    if stride is not None and not 1 <= stride < sequence_length:
        raise UserError(
            f"A stride of {stride} tokens does not fit windows of {sequence_length}; choose one from 1 to "
            f"{sequence_length - 1}."
        )


def description(sequence_length: int, stride: int | None, *, train_split: bool = False) -> str:
    """Describe windows in the words that are reported with a number."""
    cut = f"chunks of {sequence_length}" if stride is None else f"windows of {sequence_length} every {stride}"
    return f"{cut}, training split" if train_split else cut


def _named_text(named: NamedText, data: Path, train_split: bool) -> str:
    file, rows = (named.train_file, named.train_rows) if train_split else (named.file, named.rows)
    path = data / named.repository / file
    if not path.is_file():
        raise UserError(
            f"There is no {path}; run hf download {named.repository} {file} --repo-type dataset --local-dir "
            f"{data / named.repository} on a machine with network access, or set --task-data to a folder that has it."
        )
    return named.separator.join(islice(read_rows(path, named.text_key), rows))
