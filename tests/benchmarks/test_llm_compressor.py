"""The published arithmetic, written a second time, agrees with ours; and the comparison runs."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.pruning.sparse.sequential import prune_layers
from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.sparse.wanda import Wanda
from tests.benchmarks import llm_compressor, published_scripts
from tests.benchmarks.sparse_contenders import parsed
from tests.state_source import StateSource, random_ids, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", ["0.5", "0.3", "2:4", "4:8"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_published_arithmetic_gives_our_weights(tmp_path, method, sparsity):
    """Statistics of four layers in a row, thresholds, groups and updates, in one block and a half of columns."""
    settings = {"intermediate_size": 192, "seed": 3}
    ids = random_ids(12, 32)
    wanted = Sparsity.parse(sparsity)
    ours = prune_layers(
        StateSource(tiny_model(**settings)),
        TokenSet(ids, {}),
        Wanda(wanted) if method == "wanda" else SparseGPT(wanted, compat=True),
        tmp_path / "work",
    )
    model = tiny_model(**settings)
    published_scripts.prune(model, ids, method, *parsed(sparsity))
    theirs = model.state_dict()
    assert len(ours.pruned_names) == 4 * 7
    for name in ours.pruned_names:
        torch.testing.assert_close(ours.read(name), theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_line_for_each_contender(monkeypatch, capsys):
    arguments = ["--shape", "tiny", "--samples", "4", "--sequence-length", "16", "--only", "wanda"]
    monkeypatch.setattr(sys, "argv", ["llm_compressor", *arguments, "--sparsity", "2:4", "--dtype", "float32"])
    llm_compressor.main()
    lines = re.findall(r"^ *wanda 2:4, (\w+) +(.*)$", capsys.readouterr().out, re.MULTILINE)
    rows = {name: cells.split() for name, cells in lines}
    assert list(rows) == ["ours", "published"]
    for cells in rows.values():
        assert cells[7] == "50.00%"
        assert float(cells[8].rstrip("%")) > 99
