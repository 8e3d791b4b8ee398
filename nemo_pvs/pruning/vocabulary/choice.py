"""Chooses the tokens of a smaller vocabulary: the frequent ones, with those that BPE merges on the way to them.

A word that the old tokenizer encodes with kept tokens only is encoded to the same tokens by the new one: the old run
of BPE used only merges on the way to its final tokens, which are all kept. The merges of the new tokenizer are a
subset of the old ones, so whenever the best old merge is kept, it is also the best of the new ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.tokenize import tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.plan import Indices, Plan, whole_layers
from nemo_pvs.pruning.request import PruneRequest
from nemo_pvs.pruning.target import with_vocabulary
from nemo_pvs.pruning.vocabulary.tokenizer import BpeTokenizer
from nemo_pvs.system.files import sha256_bytes


def check_vocabulary(request: PruneRequest[Any]) -> None:
    """Refuse a vocabulary that the model cannot be pruned to, before any text is read.

    Raises:
        UserError: it is larger than the model's or too small, or the tokenizer is of an unsupported kind.
    """
    target = with_vocabulary(shape_of(request.source), request.options)
    check_vocabulary_size(BpeTokenizer(request.source.assets, request.source.config), target.vocab)


def with_fewer_tokens(plan: Plan, request: PruneRequest[Any], size: int) -> Plan:
    """Return a plan that also keeps only the ``size`` tokens chosen by their count in the text of the request."""
    tokenizer = BpeTokenizer(request.source.assets, request.source.config)
    assert request.token_counts is not None
    counts = request.token_counts()
    provenance = {
        "tokenizer": tokenizer_hash(tokenizer.path.parent),
        "tokens": int(counts.sum()),
        "counts": sha256_bytes(counts.numpy().tobytes()),
    }
    return replace(
        plan,
        target=plan.target.replace(vocab=size),
        keep_vocab=choose_tokens(tokenizer, counts, size),
        provenance={**plan.provenance, "vocabulary": provenance},
    )


def with_tokens_of(plan: Plan) -> Plan:
    """Return the plan that keeps a plan's tokens, and everything else of its parent."""
    parent = plan.parent
    return Plan(
        method=plan.method,
        parent=parent,
        target=parent.replace(vocab=plan.target.vocab),
        **whole_layers(parent, range(parent.layers)),
        keep_vocab=plan.keep_vocab,
        provenance=plan.provenance,
    )


def check_vocabulary_size(tokenizer: BpeTokenizer, size: int) -> None:
    """Refuse a vocabulary that is too small for the tokens that must be kept.

    Raises:
        UserError: naming the smallest possible size.
    """
    smallest = len(tokenizer.required)
    if size < smallest:
        raise UserError(
            f"A vocabulary of {size:,} cannot hold the {smallest:,} tokens of {tokenizer.path} that must be kept "
            f"(bytes, special tokens, those of the chat template); give {smallest} or more."
        )


def choose_tokens(tokenizer: BpeTokenizer, counts: torch.Tensor, size: int) -> Indices:
    """Return the ids to keep, ascending.

    Required tokens come first, then tokens by their count in the text, ties in the order of their ids. A token is kept
    only together with its derivation; if both no longer fit, less frequent tokens are tried. Tokens that no text is
    encoded to, and rows without a token, come last.

    Args:
        tokenizer: The model's tokenizer.
        counts: How often each token occurs in the text, int64 [rows of the embedding].
        size: Number of tokens to keep.

    Raises:
        UserError: the size is too small.
    """
    check_vocabulary_size(tokenizer, size)
    kept = set(tokenizer.required)
    frequency = counts.tolist()
    order = sorted(tokenizer.vocab.items(), key=lambda item: (-frequency[item[1]], item[1]))
    before = -1
    while before < len(kept) < size:  # a part that is kept later makes the whole cheaper, so try again
        before = len(kept)
        for token, index in order:
            if index in kept:
                continue
            closure = tokenizer.closure(token)
            if closure is None:
                continue
            added = closure - kept
            if len(kept) + len(added) <= size:
                kept |= added
            if len(kept) == size:
                break
    for index in range(len(frequency)):
        if len(kept) == size:
            break
        kept.add(index)
    return tuple(sorted(kept))
