"""The references' loaders against their procedures in own words, with the global generator that they use."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nemo_pvs.data.reference_sets import LOADERS, cut, load_tokens, read_rows
from nemo_pvs.data.tokenize import tokenizer_hash
from nemo_pvs.errors import UserError
from tests.conftest import save_tiny_tokenizer


def words(count: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(2, 128)}" for _ in range(count))


def to_ids(text: str) -> list[int]:
    """Tokenise with a begin-of-text token, as Llama's tokenizer does."""
    return [1, *(int(word[1:]) for word in text.split())]


DOCUMENTS = [words(count, seed) for seed, count in enumerate([3, 40, 7, 25, 12, 60, 11, 13])]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_c4_draws_documents_until_one_is_long_enough(seed: int) -> None:
    length, samples = 12, 9
    random.seed(seed)
    expected, draws = [], 0
    for _ in range(samples):
        while True:
            row = random.randint(0, len(DOCUMENTS) - 1)
            draws += 1
            ids = to_ids(DOCUMENTS[row])
            if len(ids) > length:
                break
        begin = random.randint(0, len(ids) - length - 1)
        expected.append(ids[begin : begin + length])
    tokens = cut("c4_random_docs", DOCUMENTS, to_ids, samples=samples, sequence_length=length, seed=seed)
    assert tokens.ids.tolist() == expected
    assert tokens.manifest["draws"] == draws > samples
    assert tokens.manifest["rows"] == len(DOCUMENTS)
    assert (tokens.manifest["loader"], tokens.manifest["seed"]) == ("c4_random_docs", seed)
    # A text of exactly one window and its begin-of-text token is too short, as there.
    assert len(to_ids(words(11, 0))) == length


@pytest.mark.parametrize("seed", [0, 5])
def test_wikitext2_random_joins_by_spaces_and_draws_anywhere(seed: int) -> None:
    rows = ["", " w3 w4 \n", "", *DOCUMENTS]
    stream = to_ids(" ".join(rows))
    random.seed(seed)
    expected = []
    for _ in range(20):
        begin = random.randint(0, len(stream) - 10 - 1)
        expected.append(stream[begin : begin + 10])
    seen: list[str] = []
    tokens = cut(
        "wikitext2_random",
        rows,
        lambda text: seen.append(text) or to_ids(text),
        samples=20,
        sequence_length=10,
        seed=seed,
    )
    assert tokens.ids.tolist() == expected
    assert seen == [" ".join(rows)]


@pytest.mark.parametrize(
    ("loader", "separator"), [("wikitext103_seq", "\n\n"), ("wikitext2_seq", "\n\n"), ("c4_seq", " ")]
)
def test_consecutive_windows_of_rows_joined_as_one(loader: str, separator: str) -> None:
    rows = ["", *DOCUMENTS, ""]
    seen: list[str] = []
    tokens = cut(loader, rows, lambda text: seen.append(text) or to_ids(text), samples=6, sequence_length=16, seed=3)
    assert seen == [separator.join(rows)]
    stream = to_ids(separator.join(rows))
    assert tokens.ids.flatten().tolist() == stream[: 6 * 16]
    assert tokens.manifest["seed"] is None
    assert tokens.manifest["rows"] == len(rows)


@pytest.mark.parametrize(
    ("loader", "rows"), [("wikitext103_seq", 131072), ("c4_seq", 8000), ("cnn_dailymail_seq", 8000)]
)
def test_only_the_head_of_the_text_is_read(loader: str, rows: int) -> None:
    text = ["w5"] * rows + ["w99"] * 10
    tokens = cut(loader, text, to_ids, samples=1, sequence_length=rows + 1)
    assert tokens.ids[0].tolist() == [1] + [5] * rows
    assert tokens.manifest["rows"] == rows


def test_the_draws_leave_the_global_generator_alone() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    cut("c4_random_docs", DOCUMENTS, to_ids, samples=3, sequence_length=12)
    assert random.random() == expected


def test_files_of_every_kind_give_the_same_tokens(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "tokenizer")
    records = [{"text": text} for text in DOCUMENTS]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    settings: dict[str, Any] = {"samples": 4, "sequence_length": 12, "seed": 2}
    sets = [
        load_tokens("c4_random_docs", tmp_path / name, folder, **settings)
        for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")
    ]
    plain = cut(
        "c4_random_docs", DOCUMENTS, lambda text: to_ids(text)[1:], **settings, tokenizer_sha256=tokenizer_hash(folder)
    )
    for tokens in sets:
        assert tokens.ids.tolist() == plain.ids.tolist()
        assert tokens.manifest == plain.manifest


def test_a_text_files_lines_are_rows_and_blank_ones_count(tmp_path: Path) -> None:
    """WikiText's raw file, and the rows that the datasets library makes of it."""
    path = tmp_path / "wiki.train.txt"
    path.write_text(" \n = w3 = \n \n w4 w5\x0bw6\u2028w7 \n")
    rows = ["", " = w3 = \n", "", " w4 w5\x0bw6\u2028w7 \n"]
    assert list(read_rows(path)) == rows
    parquet = tmp_path / "wiki.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": row} for row in rows]), parquet)
    assert list(read_rows(parquet)) == rows
    jsonl = tmp_path / "wiki.jsonl"
    jsonl.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert list(read_rows(jsonl)) == rows


def test_articles_come_from_their_own_column(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "cnn.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": "x", "article": text} for text in DOCUMENTS]), path)
    tokens = load_tokens("cnn_dailymail_seq", path, folder, samples=2, sequence_length=8)
    assert tokens.ids.flatten().tolist() == to_ids(" ".join(DOCUMENTS))[1:17]


def test_impossible_sets_get_one_sentence(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    for loader, settings, message in [
        ("c4", {}, "no loader 'c4'; choose c4_random_docs, "),
        ("c4_seq", {"sequence_length": 64, "context": 32}, "64 tokens do not fit the model's context of 32"),
        ("c4_random_docs", {"sequence_length": 60}, "None of the 8 documents for c4_random_docs has more than 60"),
        ("c4_random_docs", {"samples": 0}, "predict nothing"),
        ("c4_seq", {"samples": 100}, "c4_seq has 171 tokens, too few for 100 consecutive windows of 12"),
        ("wikitext2_random", {"sequence_length": 171}, "too few for 2 random windows of 171"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_tokens(loader, path, folder, **{"samples": 2, "sequence_length": 12, **settings})
        assert "\n" not in str(caught.value)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="contains no text at all"):
        load_tokens("c4_random_docs", empty, folder, samples=1, sequence_length=4)


def test_every_loader_says_which_text_it_is_for() -> None:
    assert all(loader.text and loader.windows in ("consecutive", "random", "documents") for loader in LOADERS.values())
