"""Counts how often each token occurs in a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from nemo_pvs.data.corpus import Document
from nemo_pvs.data.token_files import check_ids
from nemo_pvs.data.token_set import read_token_file
from nemo_pvs.data.tokenize import batches, encode

_AT_ONCE = 1 << 24  # ids of a token file


def counts_of_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return how often each token occurs in documents, int64 [vocab].

    Args:
        documents: Read once, a batch at a time.
        tokenizer: Encodes them, without special tokens.
        vocab: Rows of the model's embedding.
        progress: Called with (documents done, total documents); the total is 0 if ``documents`` has no length.
    """
    counts = torch.zeros(vocab, dtype=torch.int64)
    total, done = len(documents) if isinstance(documents, Sized) else 0, 0
    for batch in batches(documents):
        for ids in encode(tokenizer, batch):
            counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab)
        done += len(batch)
        if progress:
            progress(done, total)
    return counts


def counts_of_token_file(prefix: Path, vocab: int) -> torch.Tensor:
    """Return how often each token occurs in Megatron's ``prefix.bin``, int64 [vocab].

    Raises:
        UserError: as ``read_token_file``, or an id is not in the vocabulary.
    """
    ids = read_token_file(prefix)
    counts = torch.zeros(vocab, dtype=torch.int64)
    for start in range(0, len(ids), _AT_ONCE):
        part = torch.tensor(ids[start : start + _AT_ONCE].astype("int64"))
        check_ids(prefix, int(part.min()), int(part.max()), vocab)
        counts += torch.bincount(part, minlength=vocab)
    return counts
