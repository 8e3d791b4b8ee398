from __future__ import annotations

from math import prod

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from tests.conftest import tiny_llama_config
from tests.families import CASES, LAYOUTS, model_class, tiny_config

LLAMA = Layout.for_config({"architectures": ["LlamaForCausalLM"]})
SHAPES = [
    Shape(layers=3, hidden=10, ffn=6, heads=8, kv_groups=2, head_dim=4, vocab=11, tied=False),
    Shape(layers=1, hidden=12, ffn=5, heads=6, kv_groups=3, head_dim=2, vocab=7, tied=True),
    Shape(layers=2, hidden=8, ffn=4, heads=4, kv_groups=4, head_dim=2, vocab=9, tied=False),
    Shape(layers=2, hidden=8, ffn=4, heads=4, kv_groups=1, head_dim=6, vocab=9, tied=True),
]


def entry_of(shape, megatron):
    return next(entry for entry in LLAMA.entries(shape) if entry.megatron == megatron)


def random_parts(entry, shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(part.size(shape), generator=generator) for part in entry.parts]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_add_up_to_the_parameters_of_the_shape(shape):
    assert sum(prod(entry.size(shape)) for entry in LLAMA.entries(shape)) == shape.parameters
    assert sum(prod(part.size(shape)) for part, _ in LLAMA.parts(shape).values()) == shape.parameters


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_sizes_are_those_of_transformers(tied):
    config = tiny_llama_config(tie_word_embeddings=tied, num_attention_heads=6, num_key_value_heads=3)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).named_parameters()}
    shape = Shape.from_config(config.to_dict())
    assert {name: part.size(shape) for name, (part, _) in LLAMA.parts(shape).items()} == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_join_and_split_are_inverse(shape):
    for entry in LLAMA.entries(shape):
        tensors = random_parts(entry, shape)
        fused = entry.join(tensors, shape)
        assert tuple(fused.shape) == entry.size(shape)
        assert all(torch.equal(part, tensor) for part, tensor in zip(entry.split(fused, shape), tensors, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qkv_rows_are_group_major(shape):
    """Row of group j, slot a, channel t: j (g + 2) h + a h + t, with slot g the key and slot g + 1 the value."""
    entry = entry_of(shape, "self_attention.linear_qkv.weight")
    query, key, value = random_parts(entry, shape)
    fused = entry.join([query, key, value], shape)
    g, h = shape.heads_per_group, shape.head_dim
    seen = set()
    for j in range(shape.kv_groups):
        for a in range(g + 2):
            for t in range(h):
                row = j * (g + 2) * h + a * h + t
                seen.add(row)
                expected = query[(j * g + a) * h + t] if a < g else {g: key, g + 1: value}[a][j * h + t]
                assert torch.equal(fused[row], expected)
    assert seen == set(range(fused.shape[0]))


def test_gate_rows_come_before_up_rows():
    entry = entry_of(SHAPES[0], "mlp.linear_fc1.weight")
    gate, up = random_parts(entry, SHAPES[0])
    fused = entry.join([gate, up], SHAPES[0])
    assert torch.equal(fused[: SHAPES[0].ffn], gate)
    assert torch.equal(fused[SHAPES[0].ffn :], up)


def test_embedding_comes_first_and_layers_in_order():
    layers = [entry.layer for entry in LLAMA.entries(SHAPES[0])]
    assert layers == [None] + [0] * 6 + [1] * 6 + [2] * 6 + [None, None]


# One feature alone is no Llama that Megatron has, but it is one that the table has.
HALF_BIASED = [("llama", {"attention_bias": True}), ("llama", {"mlp_bias": True}), ("qwen3", {"attention_bias": True})]


@pytest.mark.parametrize(
    ("family", "settings"), [*((family, settings) for family, _, settings in CASES), *HALF_BIASED], ids=str
)
def test_every_family_has_the_names_sizes_and_counts_of_transformers(family, settings):
    config = tiny_config(family, **settings)
    with torch.device("meta"):
        model = model_class(LAYOUTS[family])(config)
    layout = Layout.for_config(config.to_dict())
    shape = layout.shape(config.to_dict())
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert layout.family == family
    assert {name: part.size(shape) for name, (part, _) in layout.parts(shape).items()} == expected
    assert sum(prod(entry.size(shape)) for entry in layout.entries(shape)) == model.num_parameters()
    assert shape.parameters == model.num_parameters()


@pytest.mark.parametrize("family", LAYOUTS)
def test_sizes_that_config_json_leaves_out_are_those_of_transformers(family):
    config = tiny_config(family).to_dict()
    stated = {key: value for key, value in config.items() if key not in {"head_dim", "num_key_value_heads"}}
    stated["num_attention_heads"] = 32  # which the KV groups that a family assumes must divide
    with torch.device("meta"):
        model = model_class(LAYOUTS[family])(model_class(LAYOUTS[family]).config_class.from_dict(dict(stated)))
    shape = LAYOUTS[family].shape(stated)
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert {name: part.size(shape) for name, (part, _) in LAYOUTS[family].parts(shape).items()} == expected


@pytest.mark.parametrize(("family", "settings"), [case[::2] for case in CASES], ids=str)
def test_join_and_split_are_inverse_for_vectors_too(family, settings):
    layout = LAYOUTS[family]
    shape = layout.shape(tiny_config(family, **settings).to_dict())
    for entry in layout.entries(shape):
        tensors = random_parts(entry, shape)
        fused = entry.join(tensors, shape)
        assert tuple(fused.shape) == entry.size(shape)
        assert all(torch.equal(part, tensor) for part, tensor in zip(entry.split(fused, shape), tensors, strict=True))


def test_biases_are_fused_in_the_order_of_their_weights():
    """A bias row belongs to the weight row of the same place, so a bias made from the weights stays made from them."""
    layout = LAYOUTS["llama"]
    shape = layout.shape(tiny_config("llama", attention_bias=True, mlp_bias=True).to_dict())
    entries = {entry.megatron: entry for entry in layout.entries(shape) if entry.layer == 0}
    for module in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        weights = random_parts(entries[f"{module}.weight"], shape)
        biases = [weight[:, 0] for weight in weights]
        fused = entries[f"{module}.weight"].join(weights, shape)
        assert torch.equal(entries[f"{module}.bias"].join(biases, shape), fused[:, 0])


def test_unknown_architecture_is_refused():
    with pytest.raises(UserError, match=r"MambaForCausalLM .*LlamaForCausalLM.* write conversions/<family>\.yaml"):
        Layout.for_config({"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UserError, match=r"write conversions/mamba\.yaml"):
        Layout.for_config({"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    with pytest.raises(UserError, match=r"model_type mamba .* write conversions/mamba\.yaml"):
        Layout.for_config({"model_type": "mamba"})
    with pytest.raises(UserError, match="names neither architectures nor model_type"):
        Layout.for_config({})


def test_only_even_llamas_need_heads_that_divide_the_hidden_size() -> None:
    """Transformers 5 checks no other family; tests/transformers5 shows that it refuses this one."""
    shape = Shape(layers=2, hidden=52, ffn=96, heads=8, kv_groups=2, head_dim=16, vocab=128, tied=False)
    note = LAYOUTS["llama"].loading_note(shape)
    assert note is not None
    assert "whose 8 heads do not divide its hidden size of 52" in note
    assert LAYOUTS["llama"].loading_note(shape.replace(hidden=48)) is None
    assert LAYOUTS["qwen3"].loading_note(shape) is None
