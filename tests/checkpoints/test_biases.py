"""Biases of one half of a layer become biases of both, without any effect."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.transforms.biases import with_both_biases
from tests.state_source import StateSource, as_transformers, random_ids, tiny_model
from tests.uneven_model import make_uneven, uneven_model

HALVES = [{"attention_bias": True}, {"mlp_bias": True}]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("make", [tiny_model, uneven_model])
@torch.no_grad()
def test_the_function_is_the_same_and_only_zeros_are_added(half, make):
    model = make(**half)
    source = with_both_biases(StateSource(model))
    assert shape_of(source).features == ("attention_bias", "mlp_bias")
    whole = as_transformers(source)
    ids = random_ids(2, 50).long()
    assert torch.equal(whole(ids).logits, model(ids).logits)
    added = whole.state_dict().keys() - model.state_dict().keys()
    kinds = {name.split(".", 3)[3] for name in added}
    projections = ("mlp.gate", "mlp.up", "mlp.down") if "attention_bias" in half else ("q", "k", "v", "o")
    prefix = "" if "attention_bias" in half else "self_attn."
    assert kinds == {f"{prefix}{name}_proj.bias" for name in projections}
    assert len(added) == 4 * len(kinds)
    assert not any(whole.state_dict()[name].any() for name in added)


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_models_with_both_or_none_are_left_alone(settings):
    source = StateSource(tiny_model(**settings))
    assert with_both_biases(source) is source


@pytest.mark.parametrize("half", HALVES)
def test_nemo_gets_both(make_tiny_llama, tmp_path, half):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16, **half))
    there = write_nemo(source, tmp_path / "nemo")
    back = write_huggingface(NemoSource(tmp_path / "nemo"), tmp_path / "back")
    assert there.tensors == back.tensors
    returned = HuggingFaceSource(tmp_path / "back")
    assert returned.config["attention_bias"] is True
    assert returned.config["mlp_bias"] is True
    parts = {name for name in back.tensors if name in source._parts}
    assert parts == source._parts.keys()
    assert all(torch.equal(returned.read(name), source.read(name)) for name in parts)
    added = back.tensors.keys() - parts
    assert added
    for name in added:
        assert name.endswith(".bias")
        assert not returned.read(name).any()
        assert returned.read(name).dtype == torch.bfloat16


@pytest.mark.slow
def test_an_uneven_half_goes_there_and_back(tmp_path):
    source = HuggingFaceSource(make_uneven(tmp_path / "hf", attention_bias=True))
    write_nemo(source, tmp_path / "nemo")
    nemo = NemoSource(tmp_path / "nemo")
    assert shape_of(nemo).features == ("attention_bias", "mlp_bias")
    assert all(torch.equal(nemo.read(name), source.read(name)) for name in source._parts)
