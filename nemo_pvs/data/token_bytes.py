"""How many bytes of text each token stands for, which makes losses of different tokenizers comparable."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import torch

from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash

_SPACE = "\u2581"  # SentencePiece's symbol for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(folder: Path) -> torch.Tensor | None:
    """Return the number of bytes of text that each token of a tokenizer stands for.

    Args:
        folder: A folder with the tokenizer's files.

    Returns:
        int64 [ids]; special tokens, which are not part of the text, have 0. None if tokens are not pieces of text
        that are joined without loss, as those of BPE over bytes or with a byte fallback are.

    Raises:
        UserError: there is no tokenizer.
    """
    return _token_bytes(folder, tokenizer_hash(folder))


@lru_cache(maxsize=8)
def _token_bytes(folder: Path, _sha256: str) -> torch.Tensor | None:
    backend = getattr(load_tokenizer(folder), "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    decoder = content.get("decoder") or {}
    steps = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
    added = {token["id"]: token for token in content["added_tokens"]}
    if content["model"].get("type") != "BPE" or not steps & {"ByteLevel", "ByteFallback"}:
        return None
    counts = torch.zeros(max([*content["model"]["vocab"].values(), *added]) + 1, dtype=torch.int64)
    for token, index in content["model"]["vocab"].items():
        if "ByteLevel" in steps:
            counts[index] = len(token)  # a character stands for a byte
        else:
            counts[index] = 1 if _BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode())
    for index, token in added.items():
        counts[index] = 0 if token["special"] else len(token["content"].encode())
    return counts
