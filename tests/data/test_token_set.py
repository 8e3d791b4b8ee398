"""Token sets: which windows they hold, what they say about their origin, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_pvs.data.token_set import TokenSet, Windows, read_token_file
from nemo_pvs.errors import UserError


def write_token_file(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_consecutive_windows_start_at_the_beginning_and_do_not_overlap() -> None:
    tokens = TokenSet.from_stream(list(range(23)), sequence_length=5, samples=3)
    assert tokens.ids.dtype == torch.int32
    assert tokens.ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def test_all_consecutive_windows_drop_only_the_tail() -> None:
    tokens = TokenSet.from_stream(list(range(23)), sequence_length=5)
    assert tokens.ids.flatten().tolist() == list(range(20))
    assert tokens.manifest["samples"] == 4


def test_random_windows_are_those_of_pythons_random() -> None:
    stream = np.arange(100)[::-1]
    generator = random.Random(42)
    starts = [generator.randint(0, 100 - 8 - 1) for _ in range(6)]
    tokens = TokenSet.from_stream(stream, sequence_length=8, samples=6, seed=42)
    assert tokens.ids.tolist() == [stream[start : start + 8].tolist() for start in starts]


def test_random_windows_stop_one_token_before_the_end() -> None:
    """As in the reference: the last possible start is left out."""
    tokens = TokenSet.from_stream(list(range(9)), sequence_length=8, samples=50, seed=0)
    assert tokens.ids.tolist() == [list(range(8))] * 50


def test_random_windows_leave_the_global_generator_alone() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    TokenSet.from_stream(list(range(50)), sequence_length=8, samples=6, seed=42)
    assert random.random() == expected


def test_the_manifest_names_text_tokenizer_and_ids() -> None:
    tokens = TokenSet.from_documents(
        ["ab", "c"],
        lambda text: list(text.encode()),
        sequence_length=2,
        data_set="letters",
        tokenizer_sha256="t" * 64,
    )
    assert tokens.ids.tolist() == [[97, 98], [10, 10]]
    assert tokens.manifest == {
        "data_set": "letters",
        "source_sha256": hashlib.sha256(b"ab\n\nc").hexdigest(),
        "tokenizer_sha256": "t" * 64,
        "samples": 2,
        "sequence_length": 2,
        "seed": None,
        "ids_sha256": hashlib.sha256(np.array([97, 98, 10, 10], dtype=np.int32).tobytes()).hexdigest(),
    }


def test_documents_are_tokenised_as_one_text() -> None:
    seen = []
    TokenSet.from_documents(
        ["a", "b"], lambda text: seen.append(text) or [1, 2, 3, 4], separator=" ", sequence_length=2
    )
    assert seen == ["a b"]


@pytest.mark.parametrize("windows", ["packed", "documents"])
def test_pieces_of_a_long_text_add_up_to_it(windows: Windows) -> None:
    """By characters, which do not depend on what is tokenised together."""
    texts = ["abcd", "", "\n\nefghijkl", "mnop", "qrstuvwxyz", "\n\n"]
    seen: list[str] = []

    def characters(text: str) -> list[int]:
        seen.append(text)
        return list(text.encode())

    settings: dict[str, Any] = {"tokenize": characters, "windows": windows, "sequence_length": 3}
    whole = TokenSet.from_documents(texts, **settings)
    assert whole.manifest["source_sha256"] == hashlib.sha256("\n\n".join(texts).encode()).hexdigest()
    for at_once in (1, 5, 12, 1000):
        seen.clear()
        pieces = TokenSet.from_documents(texts, characters_at_once=at_once, **settings)
        assert pieces.ids.tolist() == whole.ids.tolist()
        assert pieces.manifest == whole.manifest
        if windows == "packed":
            assert "".join(seen) == "\n\n".join(texts)
            assert all(len(piece) < at_once + 14 for piece in seen), "no longer than the last text makes it"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_token_file_is_read_document_after_document(dtype: type, tmp_path: Path) -> None:
    prefix = write_token_file(tmp_path / "text", [[5, 6, 7], [40000 % 30000], [8, 9, 0, 0]], dtype)
    assert read_token_file(prefix).tolist() == [5, 6, 7, 10000, 8, 9, 0, 0]
    tokens = TokenSet.from_token_file(prefix, sequence_length=4, samples=2)
    assert tokens.ids.tolist() == [[5, 6, 7, 10000], [8, 9, 0, 0]]
    assert tokens.manifest["data_set"] == "text"
    assert tokens.manifest["source_sha256"] == hashlib.sha256((tmp_path / "text.bin").read_bytes()).hexdigest()
    assert tokens.manifest["tokenizer_sha256"] is None


def test_large_ids_survive_uint16(tmp_path: Path) -> None:
    prefix = write_token_file(tmp_path / "text", [[49151, 65535]], np.uint16)
    assert TokenSet.from_token_file(prefix, sequence_length=2).ids.tolist() == [[49151, 65535]]


def test_the_hashes_come_from_the_files_manifest(tmp_path: Path) -> None:
    prefix = write_token_file(tmp_path / "text.v1", [[1, 2, 3]])
    (tmp_path / "text.v1.json").write_text(json.dumps({"tokenizer_sha256": "abc", "bin_sha256": "def"}))
    tokens = TokenSet.from_token_file(prefix, sequence_length=3, data_set="mine")
    assert tokens.manifest["tokenizer_sha256"] == "abc"
    assert tokens.manifest["source_sha256"] == "def", "the file, which may have terabytes, is not read for its hash"
    assert tokens.manifest["data_set"] == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream": []}, "has 0 tokens, too few"),
        ({"stream": range(7)}, "has 7 tokens, too few for 1 consecutive windows of 8"),
        ({"stream": range(30), "samples": 4}, "has 30 tokens, too few for 4 consecutive windows of 8"),
        ({"stream": range(8), "samples": 1, "seed": 0}, "too few for 1 random windows"),
        ({"stream": range(30), "samples": 0}, "at least 1 sample"),
        ({"stream": range(30), "sequence_length": 1}, "sequence_length of at least 2"),
        ({"stream": range(30), "seed": 0}, "need a number of samples"),
    ],
)
def test_impossible_windows_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenSet.from_stream(**{"sequence_length": 8, **settings})


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.bin does not exist"):
        read_token_file(tmp_path / "nothing")


DOCUMENTS = [list(range(10, 13)), list(range(20, 28)), list(range(30, 35)), list(range(40, 44))]


def test_windows_of_documents_never_cross_their_borders(tmp_path: Path) -> None:
    """The shorter ones are left out; drawn ones are anywhere in documents, and those of equal length included."""
    prefix = write_token_file(tmp_path / "text", DOCUMENTS)
    first = TokenSet.from_token_file(prefix, sequence_length=4, windows="documents")
    assert first.ids.tolist() == [[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43]]
    assert first.manifest["windows"] == "documents"
    drawn = TokenSet.from_token_file(prefix, sequence_length=4, samples=200, seed=3, windows="documents")
    possible = {tuple(one[start : start + 4]) for one in DOCUMENTS for start in range(len(one) - 3)}
    assert set(map(tuple, drawn.ids.tolist())) == possible
    packed = TokenSet.from_token_file(prefix, sequence_length=4, samples=200, seed=3)
    assert not set(map(tuple, packed.ids.tolist())) <= possible
    assert "windows" not in packed.manifest
    again = TokenSet.from_token_file(prefix, sequence_length=4, samples=200, seed=3, windows="packed")
    assert again.manifest == packed.manifest


def test_windows_of_documents_of_a_text_are_tokenised_one_by_one() -> None:
    texts = ["abc", "abcdefgh", "xyzuv"]
    settings = {"tokenize": lambda text: [ord(character) for character in text], "sequence_length": 4}
    tokens = TokenSet.from_documents(texts, windows="documents", **settings)
    assert tokens.ids.tolist() == [[ord(character) for character in text[:4]] for text in texts[1:]]


def test_documents_that_are_all_too_short_are_refused(tmp_path: Path) -> None:
    prefix = write_token_file(tmp_path / "text", DOCUMENTS)
    with pytest.raises(UserError, match="0 of the 4 documents of text have 9 tokens or more, but 1 must"):
        TokenSet.from_token_file(prefix, sequence_length=9, samples=2, seed=0, windows="documents")
    with pytest.raises(UserError, match="2 of the 4 documents of text have 5 tokens or more, but 3 must"):
        TokenSet.from_token_file(prefix, sequence_length=5, samples=3, windows="documents")
