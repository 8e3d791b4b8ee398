"""Tokenises one part of a text: ids, lengths and hashes of its documents, for the files that ``shards`` joins.

Workers import this module, so nothing here imports PyTorch, Transformers or Megatron.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from nemo_pvs.data.corpus import BlankFilter, Document, read_file
from nemo_pvs.data.encoder import make_encoder
from nemo_pvs.data.parts import FilePart
from nemo_pvs.data.split import split_of
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import whole_folder, write_json
from nemo_pvs.system.processes import die_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "part.json"
HASHES = "documents.sha256"
"""The SHA-256 of every document of the part, 32 bytes each."""
IDS, LENGTHS = ".ids", ".lengths"
"""Suffixes of a split's files: the ids, and the number of ids of each document as int32."""

_BATCH = 64
_MOST_TOKENS = 2**31 - 1
"""In a document, as the lengths are int32."""


@dataclass(frozen=True)
class Settings:
    """What determines the tokens of every part."""

    description: str | None
    """The tokenizer's ``encoder.describe``."""
    tokenizer: PreTrainedTokenizerBase | None
    """The tokenizer, if it has no description."""
    end: int
    """The id that ends a document."""
    dtype: str
    shares: tuple[tuple[str, float], ...]
    seed: int
    text_key: str


class PartWriter:
    """Tokenises parts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._encoder = make_encoder(settings.description, settings.tokenizer, settings.dtype)

    def write(self, part: FilePart, folder: Path) -> None:
        """Write a part as a new ``folder``: ids and lengths of every split with a document, hashes and a manifest.

        Raises:
            UserError: the text is damaged, or the disk is full.
        """
        settings = self._settings
        shares = dict(settings.shares)
        end = np.array(settings.end, settings.dtype).tobytes()
        documents = dict.fromkeys(shares, 0)
        lengths: dict[str, list[int]] = {name: [] for name in shares}
        blank = BlankFilter()
        read = read_file(part.file, settings.text_key, start=part.start, end=part.end)
        with whole_folder(folder) as partial, ExitStack() as closing:
            hashes = closing.enter_context(open(partial / HASHES, "wb"))
            files: dict[str, IO[bytes]] = {}
            for batch in _batches(blank.apply(read)):
                for document, ids in zip(batch, self._encoder.encode([one.text for one in batch]), strict=True):
                    hashes.write(hashlib.sha256(document.text.encode()).digest())
                    name = split_of(document.text, shares, settings.seed)
                    if name not in files:
                        files[name] = closing.enter_context(open(partial / f"{name}{IDS}", "wb"))
                    files[name].write(ids + end)
                    lengths[name].append(_checked(len(ids) // len(end) + 1, document, part))
                    documents[name] += 1
            for name in files:
                np.array(lengths[name], np.int32).tofile(partial / f"{name}{LENGTHS}")
            write_json(partial / MANIFEST, {"documents": documents, "without_text": blank.count})


def _checked(length: int, document: Document, part: FilePart) -> int:
    if length > _MOST_TOKENS:
        raise UserError(
            f"{part.file} has a document of {length:,} tokens ({document.id}), but Megatron's files hold at most "
            f"{_MOST_TOKENS:,} each; divide it, such as into one document per line of a .jsonl file."
        )
    return length


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    remaining = iter(documents)
    while batch := list(islice(remaining, _BATCH)):
        yield batch


_writer: PartWriter
"""Of a worker."""


def start_worker(settings: Settings) -> None:
    """Make a process a worker on one core, which ends with its parent."""
    global _writer
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _writer = PartWriter(settings)


def write_part(part: FilePart, folder: Path) -> None:
    """Write a part in a worker; see ``PartWriter.write``."""
    _writer.write(part, folder)
