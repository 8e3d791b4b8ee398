"""Checks existing token files: that they suit the model, are long enough, and which they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pvs.data.tokenize import count_tokens
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json, sha256_file, sha256_json

# Number of ids sampled at the beginning, in the middle and at the end of a file to check its vocabulary.
_SAMPLE = 1 << 20
_BLEND_SURPLUS = 0.005
"""Megatron builds this fraction more samples from each file of a blend than it needs."""


def describe_token_file(prefix: Path, tokenizer_sha256: str, vocab: int) -> dict[str, Any]:
    """Check that a token file suits a model; return its number of ``tokens`` and its hash (``bin_sha256``).

    Args:
        prefix: Path without suffix.
        tokenizer_sha256: Hash of the model's tokenizer (``tokenize.tokenizer_hash``).
        vocab: Rows of the model's embedding.

    Raises:
        UserError: the files are missing or damaged, do not belong together, or were made with another tokenizer or a
            larger vocabulary.
    """
    tokens = count_tokens(prefix)
    if not tokens:
        raise UserError(f"{prefix}.bin contains no tokens; tokenise some text into it.")
    check_tokenizer(prefix, tokenizer_sha256)
    if token_file_manifest(prefix).get("tokens", tokens) != tokens:
        raise UserError(
            f"{prefix}.json describes another file than {prefix}.bin, which has {tokens:,} tokens; restore the file "
            "that belongs to it, or remove it."
        )
    check_ids(prefix, *_extreme_ids(prefix, tokens), vocab)
    return {"tokens": tokens, "bin_sha256": token_file_hash(prefix)}


def check_ids(prefix: Path, smallest: int, largest: int, vocab: int) -> None:
    """Refuse a token file with ids that the model's vocabulary does not have.

    Args:
        prefix: Path without suffix.
        smallest: The smallest of its ids, or of those that were read.
        largest: The largest one, likewise.
        vocab: Rows of the model's embedding.

    Raises:
        UserError: naming the file and the id.
    """
    if smallest < 0:
        raise UserError(
            f"{prefix}.bin contains the token {smallest:,}, which no tokenizer has, so it may be damaged; tokenise "
            "the text again."
        )
    if largest >= vocab:
        raise UserError(
            f"{prefix}.bin contains the token {largest:,}, but the model's vocabulary ends at {vocab - 1:,}; "
            "tokenise the text with the model's tokenizer."
        )


def check_tokenizer(prefix: Path, tokenizer_sha256: str) -> None:
    """Refuse a token file whose manifest names another tokenizer than the model's.

    Raises:
        UserError: naming the file.
    """
    made_with = str(token_file_manifest(prefix).get("tokenizer_sha256", tokenizer_sha256))
    if made_with != tokenizer_sha256:
        raise UserError(
            f"{prefix}.bin was made with another tokenizer than the model's ({made_with[:12]}, not "
            f"{tokenizer_sha256[:12]}); tokenise the text with the model's."
        )


def token_file_manifest(prefix: Path) -> dict[str, Any]:
    """Return the manifest that ``pvs tokenize`` wrote next to a token file; an empty one if there is none.

    Raises:
        UserError: the file is not a manifest.
    """
    path = _companion(prefix, ".json")
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the manifest of a token file; restore it, or remove it.")
    return values


def token_file_hash(prefix: Path) -> str:
    """Return a hash that identifies a token file.

    It is taken from the manifest that ``pvs tokenize`` wrote; without a manifest it covers the index and the size,
    because the tokens themselves may be terabytes.
    """
    known = token_file_manifest(prefix).get("bin_sha256")
    identity = {"index": sha256_file(_companion(prefix, ".idx")), "bytes": _companion(prefix, ".bin").stat().st_size}
    return str(known or sha256_json(identity))


def check_end(
    end: int, sequence_length: int, tokens: Sequence[int], weights: Sequence[float] | None, names: Sequence[str]
) -> None:
    """Refuse to read past the end of the training data, where Megatron would silently start it again.

    Args:
        end: Number of tokens from the start of the data to the last one read.
        sequence_length: Tokens per sequence; each sequence also needs the next token, which its last one predicts.
        tokens: Number of tokens in each file.
        weights: Weights of the files in a blend; None if they are read whole.
        names: Names of the files.

    Raises:
        UserError: a file has too few tokens.
    """
    sequences = -(-end // sequence_length)
    available = [max(0, count - 1) // sequence_length for count in tokens]
    if weights is None:
        if sequences > sum(available):
            raise UserError(
                f"Training reads {end:,} tokens from the start of the data, but the training split has "
                f"{sum(tokens):,} tokens; use more text, or lower train.tokens, budgets or data.token_ranges."
            )
        return
    for name, count, in_file, weight in zip(names, tokens, available, weights, strict=True):
        share = math.ceil(sequences * weight / sum(weights))
        wanted = math.ceil(share * (1 + _BLEND_SURPLUS))
        if wanted > in_file:
            raise UserError(
                f"Training reads {wanted * sequence_length:,} tokens of {name}.bin (weight {weight:g}), but it has "
                f"{count:,} tokens; use more text, or lower its weight, budgets or data.token_ranges."
            )


def _extreme_ids(prefix: Path, tokens: int) -> tuple[int, int]:
    """Return the smallest and the largest id in a sample of a token file."""
    file = _companion(prefix, ".bin")
    dtype = np.dtype({1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.int64}[file.stat().st_size // tokens])
    ids = np.memmap(file, dtype=dtype, mode="r")
    middle = max(0, tokens // 2 - _SAMPLE // 2)
    samples = [ids[start : start + _SAMPLE] for start in (0, middle, max(0, tokens - _SAMPLE))]
    return int(min(sample.min() for sample in samples)), int(max(sample.max() for sample in samples))


def _companion(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
