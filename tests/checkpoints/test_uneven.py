"""Uneven layers in the NeMo format, and what pruning makes of a model when layers keep different amounts."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_pvs.checkpoints.convert import verify_checkpoint
from nemo_pvs.checkpoints.files.torch_dist import TensorBlock, write_torch_dist
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.transforms.pad import pad_layers
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import LayerSizes
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from tests.checkpoints.test_megatron import load_all
from tests.state_source import StateSource, as_transformers, random_ids, tiny_model
from tests.uneven_model import BIASES, LLAMA3_ROPE, SIZES, make_uneven

_LAYERS = "module.decoder.layers."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"tie_word_embeddings": True, **BIASES}),
        (torch.float16, {"rope_scaling": LLAMA3_ROPE, "vocab_size": 131}),
        (torch.float32, {"family": "mistral", "sliding_window": 64}),
        (torch.float32, {"family": "qwen2"}),
        (torch.float32, {"family": "qwen3", "tie_word_embeddings": True}),
    ],
    ids=["plain", "tied, biases", "llama3 rope", "mistral with a window", "qwen2", "qwen3, tied"],
)
@pytest.mark.parametrize("keep_ours", [True, False], ids=["our config kept", "NeMo's config alone"])
def test_there_and_back_is_bit_exact(tmp_path, dtype, settings, keep_ours):
    source = HuggingFaceSource(make_uneven(tmp_path / "hf", dtype, **settings))
    there = write_nemo(source, tmp_path / "nemo", pad_vocab_to_multiple=2)
    if not keep_ours:
        (tmp_path / "nemo" / "context" / "huggingface_config.json").unlink()
    nemo = NemoSource(tmp_path / "nemo")
    assert shape_of(nemo).replace(vocab=1) == shape_of(source).replace(vocab=1)
    if not keep_ours:  # padding rows are then part of the vocabulary, and keys that NeMo has no word for are gone
        shared = {*nemo.config} & {*source.config} - {"vocab_size"}
        assert {"layer_shapes", "architectures", "model_type"} <= shared
        assert "rope_scaling" in shared or "rope_scaling" not in source.config
        assert {key: nemo.config[key] for key in shared} == {key: source.config[key] for key in shared}
        return
    back = write_huggingface(nemo, tmp_path / "back")
    assert there.tensors == back.tensors
    assert there.source == back.source == fingerprint(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == source.config
    for checkpoint in ("nemo", "back"):
        verify_checkpoint(tmp_path / checkpoint)


def test_names_and_sizes_are_those_of_megatron(tmp_path):
    """tests/megatron/test_uneven.py has Megatron ask for exactly these; here their sizes by hand."""
    write_nemo(HuggingFaceSource(make_uneven(tmp_path / "hf")), tmp_path / "nemo")
    expected = {
        "module.embedding.word_embeddings.weight": (128, 64),
        "module.output_layer.weight": (128, 64),
        "module.decoder.final_layernorm.weight": (64,),
    }
    for layer, (ffn, heads, groups) in enumerate(SIZES):
        expected |= {
            f"{_LAYERS}{layer}.self_attention.linear_qkv.layer_norm_weight": (64,),
            f"{_LAYERS}{layer}.self_attention.linear_qkv.weight": ((heads + 2 * groups) * 16, 64),
            f"{_LAYERS}{layer}.self_attention.linear_proj.weight": (64, heads * 16),
            f"{_LAYERS}{layer}.mlp.linear_fc1.layer_norm_weight": (64,),
            f"{_LAYERS}{layer}.mlp.linear_fc1.weight": (2 * ffn, 64),
            f"{_LAYERS}{layer}.mlp.linear_fc2.weight": (64, ffn),
        }
    assert {name: tuple(tensor.shape) for name, tensor in load_all(tmp_path / "nemo").items()} == expected


def test_even_layers_that_are_stored_apart_are_read(make_tiny_llama, tmp_path):
    """Megatron does so when it is asked for non-homogeneous layers."""
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "hf"))
    write_nemo(source, tmp_path / "nemo")
    stacked = load_all(tmp_path / "nemo")
    apart = {}
    for name, tensor in stacked.items():
        if name.startswith(_LAYERS):
            apart |= {name.replace(_LAYERS, f"{_LAYERS}{layer}."): one for layer, one in enumerate(tensor)}
        else:
            apart[name] = tensor
    for file in ("__0_0.distcp", ".metadata"):
        (tmp_path / "nemo" / "weights" / file).unlink()
    blocks = [
        TensorBlock(name, tuple(one.shape), (0,) * one.ndim, tuple(one.shape), one.dtype, lambda one=one: one)
        for name, one in apart.items()
    ]
    write_torch_dist(tmp_path / "nemo" / "weights", blocks, [])
    assert fingerprint(NemoSource(tmp_path / "nemo")) == fingerprint(source)


def test_weights_of_another_layer_are_refused(tmp_path):
    write_nemo(HuggingFaceSource(make_uneven(tmp_path / "hf")), tmp_path / "nemo")
    path = tmp_path / "nemo" / "context" / "huggingface_config.json"
    config = json.loads(path.read_text())
    config["layer_shapes"].reverse()
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"layers\.0\.\S+ in .* but its context implies"):
        NemoSource(tmp_path / "nemo")


def _uneven_plan(source) -> Plan:
    """Keep layers 0, 1 and 3 of four, with two to six of eight KV groups and other numbers of channels in each."""
    parent = shape_of(source)
    ffn = (tuple(range(0, 96, 2)), tuple(range(96)), (1, 5, 7, 90))
    groups = ((0, 1, 4, 5, 6, 7), (2, 7), (0, 3, 5))
    hidden = tuple(range(0, 64, 3))
    sizes = [LayerSizes(len(a), 2 * len(b), len(b)) for a, b in zip(ffn, groups, strict=True)]
    return Plan(
        method="test",
        parent=parent,
        target=parent.replace(hidden=len(hidden)).with_layers(sizes),
        keep_layers=(0, 1, 3),
        keep_hidden=hidden,
        keep_ffn=ffn,
        keep_kv_groups=groups,
    )


@torch.no_grad()
def test_an_uneven_plan_cuts_what_it_says(tmp_path):
    """Sliced by the plan equals the parent with all else set to zero, but for the norms' means over fewer channels."""
    model = tiny_model(num_attention_heads=16, num_key_value_heads=8, **BIASES)
    source = StateSource(model)
    plan = _uneven_plan(source)
    pruned = PrunedSource(source, plan)
    assert shape_of(pruned).uneven == plan.target.uneven
    sliced = as_transformers(pruned)

    whole = tiny_model(num_attention_heads=16, num_key_value_heads=8, **BIASES)
    whole.load_state_dict(model.state_dict())
    layers = whole.model.layers
    gone = [index for index in range(64) if index not in plan.keep_hidden]
    for name, parameter in whole.named_parameters():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) or "norm" in name:
            parameter[..., gone] = 0
        elif "o_proj" in name or "down_proj" in name:
            parameter[gone] = 0
    for layer, ffn, groups in zip(plan.keep_layers, plan.keep_ffn, plan.keep_kv_groups, strict=True):
        channels = [index for index in range(96) if index not in ffn]
        layers[layer].mlp.down_proj.weight[:, channels] = 0
        heads = [index for index in range(16) if index // 2 not in groups]
        layers[layer].self_attn.o_proj.weight.view(64, 16, 16)[:, heads] = 0
    del layers[2]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    for norm in [whole.model.norm, *(getattr(one, f"{kind}_layernorm") for one in layers for kind in _NORMS)]:
        norm.weight *= (22 / 64) ** 0.5  # the mean over 64 channels, of which 42 are zero
        norm.variance_epsilon *= 22 / 64
    ids = random_ids(2, 40).long()
    torch.testing.assert_close(
        sliced(ids, use_cache=False).logits, whole(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


_NORMS = ("input", "post_attention")


@torch.no_grad()
def test_pruned_unevenly_through_nemo_padded_to_stock(make_tiny_llama, tmp_path):
    parent = HuggingFaceSource(make_tiny_llama(tmp_path / "hf", num_attention_heads=16, num_key_value_heads=8))
    pruned = PrunedSource(parent, _uneven_plan(parent))
    write_huggingface(pruned, tmp_path / "uneven")
    write_nemo(pruned, tmp_path / "nemo")
    write_huggingface(pad_layers(NemoSource(tmp_path / "nemo")), tmp_path / "padded")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven").eval()
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "padded").eval()
    assert not hasattr(stock.config, "layer_shapes")
    ids = random_ids(2, 40).long()
    torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
