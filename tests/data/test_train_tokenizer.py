"""``pvs tokenizer``: a byte-level BPE tokenizer that Transformers loads and that can encode every text."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nemo_pvs.api.train_tokenizer import train_tokenizer
from nemo_pvs.data.corpus import Document
from nemo_pvs.data.tokenize import load_tokenizer, tokenize, tokenizer_hash
from nemo_pvs.errors import UserError

WORDS = ["pruning", "training", "scratch", "parent", "tokens", "layers"]
TEXT = "\n".join(f"{WORDS[index % 6]} {WORDS[index * 5 % 6]} {index}" for index in range(400))


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT)
    train_tokenizer(folder / "text.txt", folder / "made", vocab=280)
    return folder


def test_every_text_comes_back_and_ends_with_the_first_token(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder / "made")
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.eos_token) == (280, 0, "<|endoftext|>")
    for text in ("pruning the parent", "  two  spaces\n\ttab", "Grüße, 你好 🙂 \x00", "v1.25"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"] == ids  # nothing is added
    manifest = tokenize([Document("pruning the parent", "0")], folder / "made", tmp_path / "tokens")
    assert manifest["tokens"] == len(tokenizer("pruning the parent")["input_ids"]) + 1


def test_frequent_words_are_one_token_and_digits_are_apart(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "made")
    assert tokenizer.tokenize("pruning") == ["pruning"]
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_the_same_text_gives_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    train_tokenizer([folder / "text.txt"], tmp_path / "again", vocab=280)
    assert tokenizer_hash(tmp_path / "again") == tokenizer_hash(folder / "made")


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        (256, "A vocabulary of 256 cannot hold the 256 bytes; give 257 or more."),
        (5000, "only enough different words for"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, vocab: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(folder / "text.txt", tmp_path / "made", vocab=vocab)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_traceback(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own ``save`` raises a plain Exception."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        train_tokenizer(folder / "text.txt", tmp_path / "made", vocab=280)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(folder: Path) -> None:
    with pytest.raises(UserError, match="already exists"):
        train_tokenizer(folder / "text.txt", folder / "made", vocab=280)
