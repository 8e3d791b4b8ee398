"""The bytes of a text's tokens are the bytes of the text, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pvs.data.token_bytes import token_bytes
from tests.conftest import save_tiny_tokenizer
from tests.pruning.test_vocabulary import KINDS, SPECIAL, save

TEXTS = ["pruning the layers", "Grüße, 你好 🙂", "  two  spaces\n\ttab 1999", "<tool>méthods", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_those_of_their_text(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    counts = token_bytes(save(tmp_path / "tokenizer", tokenizer))
    assert counts is not None
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        in_front = kind == "characters"  # SentencePiece puts a space there
        assert int(counts[ids].sum()) == len(text.encode()) + (in_front and text != "")
    assert not counts[[tokenizer.token_to_id(token) for token in SPECIAL]].any()


def test_tokens_that_are_not_joined_without_loss_have_no_bytes(tmp_path: Path) -> None:
    assert token_bytes(save_tiny_tokenizer(tmp_path)) is None
