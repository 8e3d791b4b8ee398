"""Uneven models padded with zeros: stock Llamas that compute the same, whose added weights are zero."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.transforms.pad import pad_layers
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import LayerSizes
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from tests import families
from tests.state_source import StateSource, as_transformers, random_ids, tiny_model
from tests.uneven_model import BIASES, BOUNDS, LLAMA3_ROPE, make_uneven, uneven_model


@pytest.mark.parametrize(
    "settings",
    [{}, BIASES, {"attention_bias": True, "tie_word_embeddings": True}, {"rope_scaling": LLAMA3_ROPE}],
    ids=["plain", "biases", "tied, attention biases", "llama3 rope"],
)
@torch.no_grad()
def test_the_function_is_the_same(settings):
    """In float64, where nothing hides behind rounding; biases are random, so a wrongly placed one would show."""
    model = uneven_model(**settings).double()
    padded = as_transformers(pad_layers(StateSource(model))).double()
    assert type(padded) is LlamaForCausalLM
    assert padded.config.num_attention_heads == BOUNDS.heads
    ids = random_ids(2, 100).long()
    torch.testing.assert_close(padded(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)


def test_only_zeros_are_added():
    model = uneven_model(**BIASES)
    source = StateSource(model)
    padded = pad_layers(source)
    for name, weight in as_transformers(padded).state_dict().items():
        original = source.read(name)
        assert weight.count_nonzero() == original.count_nonzero()
        assert torch.equal(weight[weight != 0], original[original != 0])  # in their order, too
    assert shape_of(padded).layer_sizes == (BOUNDS,) * 4
    assert shape_of(padded).features == shape_of(source).features


def test_heads_stay_with_their_groups():
    """The second layer has 2 heads in 2 groups, the bounds 24 in 6: head j becomes head 4 j."""
    sizes = LayerSizes(96, 24, 6), LayerSizes(96, 2, 2)
    model = uneven_model(sizes=sizes, bounds=sizes[0], head_dim=16)
    name = "model.layers.1.self_attn.{}_proj.weight"
    padded = pad_layers(StateSource(model))
    query, original = padded.read(name.format("q")).view(24, 16, 64), model.get_parameter(name.format("q"))
    assert torch.equal(query[[0, 4]], original.view(2, 16, 64))
    assert query.count_nonzero() == original.count_nonzero()
    out, original = padded.read(name.format("o")).view(64, 24, 16), model.get_parameter(name.format("o"))
    assert torch.equal(out[:, [0, 4]], original.view(64, 2, 16))
    key, original = padded.read(name.format("k")).view(6, 16, 64), model.get_parameter(name.format("k"))
    assert torch.equal(key[:2], original.view(2, 16, 64))


def test_masks_grow_with_their_weights():
    """A mask that keeps every weight that is not zero still does; what is added is pruned, unless all is dense."""
    source = StateSource(uneven_model())
    name = "model.layers.1.self_attn.o_proj.weight"
    source.read(name)[:, ::3] = 0
    source.masks = NonzeroMasks(source, (name,))
    padded = pad_layers(source)
    assert masks_of(padded).names == (name,)
    mask = masks_of(padded).read(name)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, padded.read(name) != 0)
    assert not masks_of(pad_layers(StateSource(uneven_model()))).names


class NonzeroMasks:
    def __init__(self, source, names):
        self.source, self.names = source, names

    def read(self, name):
        return self.source.read(name) != 0


@pytest.mark.slow
def test_even_models_are_left_alone():
    source = StateSource(tiny_model())
    assert pad_layers(source) is source


@torch.no_grad()
def test_stock_transformers_loads_the_padded_folder(tmp_path):
    folder = make_uneven(tmp_path / "uneven", torch.bfloat16, **BIASES)
    write_huggingface(pad_layers(HuggingFaceSource(folder)), tmp_path / "even")
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert "layer_shapes" not in config
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "even", dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = random_ids(2, 50).long()
    torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", families.LAYOUTS)
@torch.no_grad()
def test_every_family_pruned_unevenly_computes_what_is_left_with_and_without_padding(family, tmp_path):
    """Both equal the parent with the same units silenced."""
    parent = families.tiny_model(family, num_key_value_heads=4)
    shape = shape_of(StateSource(parent))
    ffn = ((0, 5, 9), tuple(range(40)), tuple(range(10, 96)))
    groups = ((1,), (0, 1, 2, 3), (0, 2))
    kept = shape.with_layers(
        LayerSizes(len(f), len(g) * shape.heads_per_group, len(g)) for f, g in zip(ffn, groups, strict=True)
    )
    plan = Plan("by hand", shape, kept, (0, 1, 2), tuple(range(shape.hidden)), ffn, groups)
    pruned = PrunedSource(StateSource(parent), plan)
    padded = as_transformers(pad_layers(pruned))
    for index, layer in enumerate(parent.model.layers):
        silent = torch.ones(shape.ffn, dtype=torch.bool)
        silent[list(ffn[index])] = False
        layer.mlp.down_proj.weight[:, silent] = 0
        heads = torch.ones(shape.kv_groups, dtype=torch.bool)
        heads[list(groups[index])] = False
        layer.self_attn.o_proj.weight[:, heads.repeat_interleave(shape.heads_per_group * shape.head_dim)] = 0
    ids = random_ids(2, 60).long()
    torch.testing.assert_close(padded(ids).logits, parent(ids).logits, rtol=1e-5, atol=1e-5)
    write_huggingface(pruned, tmp_path / "uneven")
    assert json.loads((tmp_path / "uneven" / "config.json").read_text())["model_type"] == f"pruned_{family}"
    uneven = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven").eval()
    torch.testing.assert_close(uneven(ids).logits, parent(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_family_without_a_class_for_uneven_layers_is_refused(tmp_path, monkeypatch):
    families.without_uneven_classes(monkeypatch)
    parent = families.tiny_model("qwen2")
    sizes = [LayerSizes(96, 8, 2), LayerSizes(96, 4, 1), LayerSizes(96, 8, 2)]
    shape, every = shape_of(StateSource(parent)), tuple(range(96))
    plan = Plan(
        "by hand", shape, shape.with_layers(sizes), (0, 1, 2), every[:64], (every,) * 3, ((0, 1), (0,), (0, 1))
    )
    with pytest.raises(UserError, match="qwen2 has no class for uneven layers; prune all layers alike"):
        write_huggingface(PrunedSource(StateSource(parent), plan), tmp_path / "uneven")
    assert not (tmp_path / "uneven").exists()
