"""The index of a text is built once for all budgets, before any rank starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch.distributed

from nemo_pvs.data import sample_index
from nemo_pvs.data.sample_index import index_text
from tests.megatron.ranks import write_tokens


def _index(prefix: str | list[str], folder: Path, *, samples: int = 3, seed: int = 5) -> dict[str, int]:
    index_text(prefix, folder, sequence_length=8, seed=seed, samples=samples)
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def _contents(prefix: str | list[str], folder: Path) -> dict[str, bytes]:
    _index(prefix, folder)
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_tokens(tmp_path / "train", list(range(100)))


def test_one_index_serves_every_budget_and_another_seed_needs_another(prefix, tmp_path):
    first = _index(prefix, tmp_path / "index")
    assert {name.rsplit("-", 1)[1] for name in first} == {
        "description.txt",
        "document_index.npy",
        "sample_index.npy",
        "shuffle_index.npy",
    }
    order = np.load(next((tmp_path / "index").glob("*-shuffle_index.npy")))
    assert sorted(order) == list(range(99 // 8)), "every sample of the text once"
    assert _index(prefix, tmp_path / "index", samples=9) == first
    assert len(_index(prefix, tmp_path / "index", seed=6)) == 8


@pytest.mark.parametrize("size", [0, 40, 150])
def test_an_index_that_was_cut_short_is_built_again(prefix, tmp_path, size):
    """By kill -9 or a full disk, in any of its files; Megatron would fail to read it whenever training is resumed."""
    texts = [prefix, write_tokens(tmp_path / "other", list(range(200, 260)))]
    whole = _contents(texts, tmp_path / "index")
    assert len(whole) == 8
    for name in whole:
        (tmp_path / "index" / name).write_bytes((tmp_path / "index" / name).read_bytes()[:size])
        assert _contents(texts, tmp_path / "index") == whole


def test_what_takes_long_is_announced(prefix, tmp_path, capsys, monkeypatch):
    _index(prefix, tmp_path / "quick")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sample_index, "_DOCUMENTS_A_SECOND", 1 / 600)
    _index(prefix, tmp_path / "slow")
    assert capsys.readouterr().out.startswith("indexing 1 documents, about 10 min ...")
    _index(prefix, tmp_path / "slow")
    assert "indexing" not in capsys.readouterr().out, "it is there already"


def test_a_blend_is_indexed_before_there_are_ranks(prefix, tmp_path):
    other = write_tokens(tmp_path / "other", list(range(200, 260)))
    for number, text in enumerate(([prefix, other], ["0.7", prefix, "0.3", other])):
        names = {name.rsplit("-", 1)[1] for name in _index(text, tmp_path / f"index-{number}")}
        assert "dataset_sample_index.npy" in names
    assert not torch.distributed.is_initialized()
