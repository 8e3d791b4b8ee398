"""A pruned model computes what its parent computes with the removed units switched off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.pruning import apply
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan, whole_layers
from tests.pruning.test_plan import make_plan, with_means
from tests.state_source import StateSource, as_transformers, random_ids, tiny_model
from tests.uneven_model import BIASES

IDS = random_ids(3, 20).long()


class MaskedNorm(nn.Module):
    """RMSNorm of the kept channels alone, zero elsewhere."""

    def __init__(self, weight: torch.Tensor, keep: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.mask = torch.zeros_like(weight).index_fill(0, keep, 1.0)
        self.weight, self.eps = weight, eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden * self.mask
        mean_square = hidden.square().sum(-1, keepdim=True) / self.mask.sum()
        return self.mask * self.weight * hidden * torch.rsqrt(mean_square + self.eps)


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def masked(model: LlamaForCausalLM, plan: Plan) -> LlamaForCausalLM:
    """Switch the removed units of a whole model off, without slicing anything."""
    head_dim = plan.parent.head_dim
    hidden = torch.tensor(plan.keep_hidden)
    removed = torch.ones(plan.parent.hidden).index_fill(0, hidden, 0.0).bool()

    def norm(module: nn.Module) -> MaskedNorm:
        return MaskedNorm(module.weight, hidden, module.variance_epsilon)

    with torch.no_grad():
        model.model.embed_tokens.weight[:, removed] = 0
        for index, layer in enumerate(model.model.layers):
            layer.input_layernorm = norm(layer.input_layernorm)
            layer.post_attention_layernorm = norm(layer.post_attention_layernorm)
            layer.self_attn.o_proj.weight[removed] = 0
            layer.mlp.down_proj.weight[removed] = 0
            if index not in plan.keep_layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
                continue
            kept = plan.keep_layers.index(index)
            for channel in set(range(plan.parent.ffn)) - set(plan.keep_ffn[kept]):
                layer.mlp.down_proj.weight[:, channel] = 0
            for head in range(plan.parent.heads):
                if head not in plan.heads(kept):
                    layer.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
        model.model.norm = norm(model.model.norm)
    return model


def tiny_plan(model: LlamaForCausalLM, seed: int = 0, **sizes: int) -> Plan:
    parent = shape_of(StateSource(model))
    return make_plan(parent, seed, **{"kv_groups": parent.kv_groups, **sizes})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 4, "hidden": 40, "ffn": 96},
        {"layers": 4, "hidden": 64, "ffn": 50},
        {"layers": 4, "hidden": 64, "ffn": 96, "kv_groups": 3},
        {"layers": 2, "hidden": 64, "ffn": 96},
        {"layers": 4, "hidden": 64, "ffn": 96, "heads": 4},
        {"layers": 4, "hidden": 64, "ffn": 96, "kv_groups": 3, "heads": 3},
        {"layers": 3, "hidden": 24, "ffn": 31, "kv_groups": 1},
        {"layers": 3, "hidden": 24, "ffn": 31, "kv_groups": 2, "heads": 2},
    ],
    ids=["hidden", "ffn", "kv_groups", "layers", "heads", "heads of kept groups", "all", "all with heads"],
)
def test_sliced_is_masked(sizes: dict[str, int], tied: bool) -> None:
    model = tiny_model(num_key_value_heads=4, tie_word_embeddings=tied)
    plan = tiny_plan(model, **sizes)
    sliced = logits(as_transformers(PrunedSource(StateSource(model), plan)))
    torch.testing.assert_close(sliced, logits(masked(model, plan)), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("biases", [{}, {"attention_bias": True}], ids=["none", "attention"])
def test_merged_queries_are_masked_with_the_residuals_added(biases: dict[str, bool]) -> None:
    """Rows of ``q_proj`` become ``2 head_i - head_j``; nothing else changes but what is removed."""
    model = tiny_model(**biases)  # 8 heads in 2 groups
    plan = replace(
        tiny_plan(model, layers=4, hidden=64, ffn=96, heads=4),
        keep_heads=((0, 3, 4, 5),) * 4,
        merged_heads=(((0, 2), (3, 1), (5, 6)),) * 4,
    )
    merged = PrunedSource(StateSource(model), plan)
    plain = PrunedSource(StateSource(model), replace(plan, merged_heads=()))
    changed = set()
    for name in Layout.for_config(merged.config).parts(plan.target):
        if not torch.equal(merged.read(name), plain.read(name)):
            changed.add(name.split(".", 3)[-1])
    assert changed == {"self_attn.q_proj.weight", *(["self_attn.q_proj.bias"] if biases else [])}
    sliced, without = logits(as_transformers(merged)), logits(as_transformers(plain))
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.self_attn.q_proj.parameters():
                heads = parameter.unflatten(0, (8, 16)).clone()
                for kept, removed in ((0, 2), (3, 1), (5, 6)):
                    parameter[16 * kept : 16 * kept + 16] += heads[kept] - heads[removed]
    torch.testing.assert_close(sliced, logits(masked(model, plan)), rtol=1e-5, atol=3e-5)
    assert not torch.allclose(sliced, without, atol=0.1)


def test_merging_is_in_fp32_and_refuses_masks() -> None:
    model = tiny_model().bfloat16()
    plan = replace(tiny_plan(model, heads=4), keep_heads=((0, 1, 4, 5),) * 3, merged_heads=(((1, 2),),) * 3)
    query = PrunedSource(StateSource(model), plan).read("model.layers.0.self_attn.q_proj.weight")
    whole = model.model.layers[plan.keep_layers[0]].self_attn.q_proj.weight[:, list(plan.keep_hidden)].float()
    assert query.dtype == torch.bfloat16
    assert torch.equal(query[16:32], (2 * whole[16:32] - whole[32:48]).bfloat16())
    source = StateSource(model)
    source.masks = RandomMasks(model)
    with pytest.raises(UserError, match="would fill the zeros of this sparse model"):
        PrunedSource(source, plan)


def test_removing_layers_is_zeroing_their_branches_bit_for_bit() -> None:
    model = tiny_model()
    plan = Plan(
        "depth", *(shape := shape_of(StateSource(model)), shape.replace(layers=2)), **whole_layers(shape, [0, 3])
    )
    removed = logits(as_transformers(PrunedSource(StateSource(model), plan)))
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert torch.equal(removed, logits(model))


def test_the_identity_plan_changes_no_bit() -> None:
    source = StateSource(tiny_model())
    shape = shape_of(source)
    pruned = PrunedSource(source, Plan("identity", shape, shape, **whole_layers(shape, range(4))))
    for name in Layout.for_config(source.config).parts(shape):
        assert torch.equal(pruned.read(name), source.read(name))
    assert fingerprint(pruned) == fingerprint(source)


def test_pruning_twice_is_pruning_once() -> None:
    source = StateSource(tiny_model(num_key_value_heads=4))
    shape = shape_of(source)
    depth = Plan("depth", shape, shape.replace(layers=2), **whole_layers(shape, [1, 3]))
    width = make_plan(depth.target, layers=2)
    layers = tuple(depth.keep_layers[layer] for layer in width.keep_layers)
    both = replace(width, parent=shape, keep_layers=layers)
    once, twice = PrunedSource(source, both), PrunedSource(PrunedSource(source, depth), width)
    assert fingerprint(once) == fingerprint(twice)


def test_the_order_of_units_is_no_part_of_the_function() -> None:
    """Shuffle the units of a model, and a plan with them: the logits stay, dense and pruned."""
    model = tiny_model(num_key_value_heads=4)
    plan = tiny_plan(model, layers=4, kv_groups=2)
    generator = torch.Generator().manual_seed(9)
    shuffle_hidden = torch.randperm(64, generator=generator)
    shuffled = tiny_model(num_key_value_heads=4)
    ffn, groups = [], []
    with torch.no_grad():
        for weight in (shuffled.model.embed_tokens.weight, shuffled.lm_head.weight):
            weight.copy_(weight[:, shuffle_hidden])
        shuffled.model.norm.weight.copy_(shuffled.model.norm.weight[shuffle_hidden])
        for layer in shuffled.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            ffn.append(torch.randperm(96, generator=generator))
            groups.append(torch.randperm(4, generator=generator))
            query = torch.arange(8 * 16).view(4, -1)[groups[-1]].flatten()
            key = torch.arange(4 * 16).view(4, -1)[groups[-1]].flatten()
            for linear, rows in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, key)):
                linear.weight.copy_(linear.weight[rows][:, shuffle_hidden])
            attention.o_proj.weight.copy_(attention.o_proj.weight[shuffle_hidden][:, query])
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.copy_(linear.weight[ffn[-1]][:, shuffle_hidden])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[shuffle_hidden][:, ffn[-1]])
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(norm.weight[shuffle_hidden])

    def moved(indices: tuple[int, ...], order: torch.Tensor) -> tuple[int, ...]:
        return tuple(position for position, index in enumerate(order.tolist()) if index in indices)

    shuffled_plan = replace(
        plan,
        keep_hidden=moved(plan.keep_hidden, shuffle_hidden),
        keep_ffn=tuple(moved(keep, order) for keep, order in zip(plan.keep_ffn, ffn, strict=True)),
        keep_kv_groups=tuple(moved(keep, order) for keep, order in zip(plan.keep_kv_groups, groups, strict=True)),
    )
    torch.testing.assert_close(logits(shuffled), logits(model), rtol=1e-5, atol=1e-4)
    pruned, shuffled_pruned = (
        logits(as_transformers(PrunedSource(StateSource(some), its_plan)))
        for some, its_plan in ((model, plan), (shuffled, shuffled_plan))
    )
    torch.testing.assert_close(shuffled_pruned, pruned, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(pruned, logits(model), atol=0.1)


def test_gate_up_and_down_lose_the_same_channels() -> None:
    source = StateSource(tiny_model())
    plan = tiny_plan(source.model, layers=4, hidden=64, ffn=3)
    pruned = PrunedSource(source, plan)
    for layer, channels in enumerate(plan.keep_ffn):
        mlp = f"model.layers.{layer}.mlp."
        for position, channel in enumerate(channels):
            for name in ("gate_proj.weight", "up_proj.weight"):
                assert torch.equal(pruned.read(mlp + name)[position], source.read(mlp + name)[channel])
            down = pruned.read(f"{mlp}down_proj.weight")[:, position]
            assert torch.equal(down, source.read(f"{mlp}down_proj.weight")[:, channel])


@pytest.mark.parametrize("sizes", [{"kv_groups": 1}, {"kv_groups": 2, "heads": 6}], ids=["groups", "heads"])
def test_exports_keep_head_dim_and_load_in_transformers_and_nemo(
    sizes: dict[str, int], make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "parent", dtype=torch.bfloat16))
    pruned = PrunedSource(source, make_plan(shape_of(source), **sizes))
    assert pruned.config["head_dim"] == 16
    assert pruned.config["hidden_size"] == 40
    write_huggingface(pruned, tmp_path / "huggingface")
    write_nemo(pruned, tmp_path / "nemo")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface", dtype=torch.float32)
    assert exported.config.head_dim == 16
    assert torch.equal(logits(exported), logits(as_transformers(pruned)))
    in_nemo = NemoSource(tmp_path / "nemo")
    assert shape_of(in_nemo) == pruned._plan.target
    assert fingerprint(in_nemo) == fingerprint(pruned)
    write_huggingface(in_nemo, tmp_path / "back")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)), logits(exported)
    )


def test_only_the_wanted_tensor_is_read() -> None:
    source = StateSource(tiny_model())
    pruned = PrunedSource(source, tiny_plan(source.model))
    source.reads.clear()
    pruned.read("model.layers.2.mlp.up_proj.weight")
    assert source.reads == [f"model.layers.{pruned._plan.keep_layers[2]}.mlp.up_proj.weight"]


def test_a_plan_for_another_model_is_refused() -> None:
    source = StateSource(tiny_model())
    plan = tiny_plan(source.model)
    with pytest.raises(UserError, match="The plan was made for"):
        PrunedSource(StateSource(tiny_model(hidden_size=48)), plan)
    named = replace(plan, provenance={"model_fingerprint": fingerprint(source)})
    PrunedSource(source, named)
    with pytest.raises(UserError, match="a model of this size with other weights"):
        PrunedSource(StateSource(tiny_model(seed=1)), named)


def test_a_weight_table_that_does_not_add_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new family's table may forget a tensor; what is not in the table would be lost silently."""
    source = StateSource(tiny_model())
    layout = Layout.for_config(source.config)
    forgetful = Layout("llama", {**layout.table, "layer": layout.table["layer"][1:]})
    monkeypatch.setattr(apply.Layout, "for_config", lambda config: forgetful)
    with pytest.raises(UserError, match="fix the table"):
        PrunedSource(source, tiny_plan(source.model))


def lost_means(model: LlamaForCausalLM, plan: Plan, layer: int, module: str) -> list[float]:
    """Return what the removed inputs of o_proj or down_proj give on average, by a float64 loop over kept outputs."""
    axis = "query" if module == "self_attn.o_proj" else "ffn"
    weight = model.model.layers[plan.keep_layers[layer]].get_submodule(module).weight.double().tolist()
    mean = dict(zip(plan.removed(axis, layer), plan.input_means.at(axis, layer).double().tolist(), strict=True))
    return [sum(weight[row][channel] * value for channel, value in mean.items()) for row in plan.keep_hidden]


@pytest.mark.parametrize("biases", [{}, {"attention_bias": True}, BIASES], ids=["none", "attention", "both"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_biases_are_the_mean_of_what_went_added_to_what_was_there(
    biases: dict[str, bool], tied: bool, heads: int
) -> None:
    model = tiny_model(num_key_value_heads=4, tie_word_embeddings=tied, **biases)
    source, plan = StateSource(model), with_means(tiny_plan(model, kv_groups=2, heads=heads))
    pruned = PrunedSource(source, plan)
    plain = PrunedSource(source, tiny_plan(model, kv_groups=2, heads=heads))
    names = set(Layout.for_config(source.config).parts(plan.target))
    had = set(Layout.for_config(source.config).parts(shape_of(plain)))
    assert {name.split(".", 3)[-1] for name in names if name.endswith("bias")} == {
        *(f"self_attn.{letter}_proj.bias" for letter in "qkvo"),
        *(f"mlp.{which}_proj.bias" for which in ("gate", "up", "down")),
    }
    for name in sorted(names):
        tensor = pruned.read(name)
        if name in had and not name.endswith(("o_proj.bias", "down_proj.bias")):
            assert torch.equal(tensor, plain.read(name))
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            layer, module = int(name.split(".")[2]), name.split(".", 3)[-1].removesuffix(".bias")
            before = plain.read(name).double() if name in had else torch.zeros(40).double()
            expected = before + torch.tensor(lost_means(model, plan, layer, module)).double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(tensor, torch.zeros_like(tensor))


def test_sliced_with_biases_is_masked_with_the_means_added() -> None:
    model = tiny_model(num_key_value_heads=4)
    plan = with_means(tiny_plan(model, layers=4, hidden=64, ffn=50, kv_groups=2))
    sliced = logits(as_transformers(PrunedSource(StateSource(model), plan)))
    lost = {
        (layer, module): torch.tensor(lost_means(model, plan, layer, module))
        for layer in range(4)
        for module in ("self_attn.o_proj", "mlp.down_proj")
    }
    whole = masked(model, plan)
    for (layer, module), values in lost.items():
        linear = whole.model.layers[layer].get_submodule(module)
        linear.register_forward_hook(lambda _, __, output, values=values: output + values)
    torch.testing.assert_close(sliced, logits(whole), rtol=1e-5, atol=1e-5)
    assert (sliced - logits(as_transformers(PrunedSource(StateSource(model), tiny_plan(model))))).abs().max() > 0.1


def test_zero_means_give_zero_biases() -> None:
    model = tiny_model()
    plan = with_means(tiny_plan(model), scale=0)
    pruned = PrunedSource(StateSource(model), plan)
    for layer in range(3):
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            assert torch.equal(pruned.read(f"model.layers.{layer}.{module}.bias"), torch.zeros(40))


def test_a_bias_is_computed_once_in_fp32_and_stored_in_the_parent_s_dtype() -> None:
    model = tiny_model(num_key_value_heads=4).bfloat16()
    source, plan = StateSource(model), with_means(tiny_plan(model, kv_groups=2))
    pruned = PrunedSource(source, plan)
    source.reads.clear()
    name = "model.layers.2.mlp.down_proj.bias"
    first, second = pruned.read(name), pruned.read(name)
    parent = f"model.layers.{plan.keep_layers[2]}.mlp.down_proj.weight"
    assert source.reads.count(parent) == 1
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)
    expected = torch.tensor(lost_means(model.float(), plan, 2, "mlp.down_proj"))
    assert torch.equal(first, expected.bfloat16())


def test_biases_stream_to_both_formats(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "parent", dtype=torch.bfloat16))
    pruned = PrunedSource(source, with_means(make_plan(shape_of(source), kv_groups=1)))
    write_huggingface(pruned, tmp_path / "huggingface")
    write_nemo(pruned, tmp_path / "nemo")
    config = json.loads((tmp_path / "huggingface" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"]
    assert config["mlp_bias"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface", dtype=torch.float32)
    assert torch.equal(logits(exported), logits(as_transformers(pruned)))
    assert fingerprint(NemoSource(tmp_path / "nemo")) == fingerprint(pruned)


def test_a_family_without_these_biases_is_refused() -> None:
    source = StateSource(tiny_model())
    source.config = {**source.config, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    shape = shape_of(source)
    plan = make_plan(shape, kv_groups=1)
    with pytest.raises(UserError, match=r"qwen2 has no .*mlp_bias; use a method that adds no biases"):
        PrunedSource(source, with_means(plan))


class RandomMasks:
    """A mask for every FFN matrix of layers 1 and 3, and for one o_proj."""

    names = (
        *(f"model.layers.{layer}.mlp.{which}_proj.weight" for layer in (1, 3) for which in ("gate", "up", "down")),
        "model.layers.3.self_attn.o_proj.weight",
    )

    def __init__(self, model: LlamaForCausalLM) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.masks = {name: torch.rand(sizes[name], generator=generator) < 0.5 for name in self.names}

    def read(self, name: str) -> torch.Tensor:
        return self.masks[name]


def test_masks_are_sliced_like_their_weights() -> None:
    """A mask of each weight's own non-zeros stays that through pruning."""
    model = tiny_model(num_key_value_heads=4)
    masks = RandomMasks(model)
    with torch.no_grad():
        for name, mask in masks.masks.items():
            model.get_parameter(name).masked_fill_(~mask, 0)
    source = StateSource(model)
    source.masks = masks
    plan = replace(tiny_plan(model, kv_groups=2), keep_layers=(0, 2, 3))
    pruned = PrunedSource(source, plan)
    assert sorted(pruned.masks.names) == sorted(
        name.replace("layers.3", "layers.2") for name in masks.names if "layers.3" in name
    )
    for name in pruned.masks.names:
        assert pruned.masks.read(name).dtype == torch.bool
        assert torch.equal(pruned.masks.read(name), pruned.read(name) != 0)
    assert PrunedSource(StateSource(model), plan).masks.names == ()
