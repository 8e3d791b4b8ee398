"""Our conversion and NeMo's own, of the same model: tensor for tensor equal, in both directions."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.model.layout import Layout
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.ranks import run_ranks
from tests.nemo_connectors import export_with_nemo, import_with_nemo

pytestmark = pytest.mark.parallel

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _assert_equal(one: WeightSource, other: WeightSource) -> None:
    assert shape_of(one) == shape_of(other)
    for name in Layout.for_config(one.config).parts(shape_of(one)):
        assert torch.equal(one.read(name), other.read(name)), name


@pytest.mark.parametrize(
    "settings",
    [{"tie_word_embeddings": False}, {"tie_word_embeddings": True, "rope_scaling": ROPE}],
    ids=["untied", "tied, llama3 rope"],
)
def test_both_ways_are_nemos(settings, tmp_path):
    hf = save_tiny_tokenizer(make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16, **settings))
    write_nemo(HuggingFaceSource(hf), tmp_path / "ours")
    run_ranks(1, import_with_nemo, hf, tmp_path / "theirs")
    _assert_equal(NemoSource(tmp_path / "ours"), NemoSource(tmp_path / "theirs"))

    write_huggingface(NemoSource(tmp_path / "theirs"), tmp_path / "ours-hf")
    run_ranks(1, export_with_nemo, tmp_path / "ours", tmp_path / "theirs-hf")
    _assert_equal(HuggingFaceSource(tmp_path / "ours-hf"), HuggingFaceSource(tmp_path / "theirs-hf"))
    _assert_equal(HuggingFaceSource(hf), HuggingFaceSource(tmp_path / "theirs-hf"))
