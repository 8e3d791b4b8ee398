"""GGUF files as models: the same logits as the Hugging Face model that was written, or a sentence."""

from __future__ import annotations

import json
import random
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_pvs.checkpoints.fetch import dequantize_gguf
from nemo_pvs.checkpoints.gguf.rope import llama3_scaling
from nemo_pvs.errors import UserError
from tests.checkpoints.gguf_writer import BYTE_TOKENIZER, head_dim, randomise, write_gguf
from tests.conftest import cases, tiny_llama_config

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return randomise(LlamaForCausalLM(tiny_llama_config(**{"num_hidden_layers": 2, "vocab_size": 260, **settings})))


def qwen(config_class: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 260}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return randomise(AutoModelForCausalLM.from_config(config_class(**sizes, **heads, **settings)))


def factors(model: LlamaForCausalLM) -> np.ndarray:
    """Return what llama.cpp's converter writes into rope_freqs.weight."""
    dim, theta = head_dim(model), model.config.rope_theta
    plain = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    return (plain / scaled).numpy()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 202)[None] * 7 % 256
    with torch.no_grad():
        return model.eval().float()(ids).logits


CASES = {
    "llama": lambda: (llama(), {}, {}),
    "llama with a tied head": lambda: (llama(tie_word_embeddings=True), {}, {}),
    "llama with biases": lambda: (llama(attention_bias=True, mlp_bias=True), {}, {}),
    "llama 3.1": lambda: (
        (model := llama(rope_scaling=SCALING, rope_theta=100.0)),
        {},
        {"rope_freqs.weight": factors(model)},
    ),
    "llama, linear": lambda: (
        llama(rope_scaling={"rope_type": "linear", "factor": 4.0}),
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {},
    ),
    "qwen2": lambda: (qwen(Qwen2Config), {}, {}),
    "qwen2, yarn": lambda: (
        qwen(
            Qwen2Config,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 64,
        },
        {},
    ),
    "qwen3": lambda: (qwen(Qwen3Config, head_dim=32, tie_word_embeddings=True), {}, {}),
    "qwen3 with biases": lambda: (qwen(Qwen3Config, head_dim=32, attention_bias=True), {}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_computes_what_the_model_that_it_was_made_from_does(case, tmp_path):
    model, keys, tensors = CASES[case]()
    folder = dequantize_gguf(write_gguf(tmp_path / "x.gguf", model, keys=keys, tensors=tensors), tmp_path / "x")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))
    if model.config.rope_scaling:
        assert again.config.rope_scaling == model.config.rope_scaling
    assert again.config.rms_norm_eps == model.config.rms_norm_eps
    assert again.config.eos_token_id == 256


def test_a_llama_without_biases_is_what_transformers_reads(tmp_path):
    padding = {"tokens": [*BYTE_TOKENIZER["tokens"], "[PAD1]", "[PAD2]", "[PAD3]"], "token_type": [1] * 257 + [5] * 3}
    path = write_gguf(tmp_path / "x.gguf", llama(), tokenizer={**BYTE_TOKENIZER, **padding})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).state_dict()
    ours = load_file(dequantize_gguf(path, tmp_path / "x") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (GGMLQuantizationType.F16, torch.float16),
        (GGMLQuantizationType.BF16, torch.bfloat16),
        (GGMLQuantizationType.Q8_0, torch.bfloat16),
    ],
)
def test_what_is_stored_without_quantisation_keeps_its_type_and_the_rest_becomes_bf16(kind, dtype, tmp_path):
    model = llama()
    folder = dequantize_gguf(write_gguf(tmp_path / "x.gguf", model, matrices=kind), tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    name = "model.layers.1.mlp.down_proj.weight"
    stored = dequantize(quantize(model.state_dict()[name].numpy(), kind), kind)
    assert torch.equal(tensors[name], torch.from_numpy(stored).to(dtype))


@pytest.mark.parametrize(("factor", "theta", "dim"), [(8.0, 500000.0, 128), (32.0, 500000.0, 64)])
def test_the_scaling_of_llama_3_1_and_3_2_is_found_in_its_factors(factor, theta, dim):
    published = {**SCALING, "factor": factor, "original_max_position_embeddings": 8192}
    config = tiny_llama_config(rope_scaling=published, rope_theta=theta, head_dim=dim, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    assert llama3_scaling((plain / scaled).double().numpy(), theta, dim) == published


ALTERED = {
    "architecture gemma2; the GGUF architectures that are read are llama, deci, qwen2, qwen3": {
        "general.architecture": "gemma2"
    },
    "has llama.logit_scale = 0.5, which is not supported": {"llama.logit_scale": 0.5},
    "has llama.expert_count = 8, which is not supported": {"llama.expert_count": 8},
    "llama.attention.head_count in .* differs between layers": {"llama.attention.head_count": [8, 4]},
    "llama.rope.dimension_count in .* is 8, but heads have 16": {"llama.rope.dimension_count": 8},
    "llama.rope.scaling.type in .* is longrope": {"llama.rope.scaling.type": "longrope"},
    "does not have the 2147483648 layers": {"llama.block_count": 2**31},
    "llama.block_count in .* is 'two', which is not a size": {"llama.block_count": "two"},
    "lacks the key llama.context_length": {"llama.context_length": None},
    r"ffn_gate.weight in .* is \[96, 64\], but the keys imply \[80, 64\]": {"llama.feed_forward_length": 80},
    "is one of 3 parts of a model; join them": {"split.count": 3},
}


@pytest.mark.parametrize("said", ALTERED)
def test_a_key_that_is_not_understood_is_refused_by_name(said, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", llama(), keys=ALTERED[said])
    with pytest.raises(UserError, match=said):
        dequantize_gguf(path, tmp_path / "x")
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


OTHER_TENSORS = {
    "has 1 tensors that a llama model does not have: blk.0.ffn_gate_inp.weight": {
        "blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)
    },
    "lacks 1 tensors that its keys imply: blk.1.ffn_up.weight": {"blk.1.ffn_up.weight": None},
    "lacks 7 tensors that its keys imply: blk.0.attn_k.bias": {"blk.0.attn_q.bias": np.ones(128, np.float32)},
    "has no tensor token_embd.weight": {"token_embd.weight": None},
    "The factors in rope_freqs.weight of .* are not those of Llama 3": {
        "rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)
    },
}


@pytest.mark.parametrize("said", OTHER_TENSORS)
def test_other_tensors_than_the_keys_imply_are_refused_by_name(said, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", llama(), tensors=OTHER_TENSORS[said])
    with pytest.raises(UserError, match=said):
        dequantize_gguf(path, tmp_path / "x")
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_more_tokens_than_rows_of_the_embedding_are_refused(tmp_path):
    tokens = [*BYTE_TOKENIZER["tokens"], "more", "and", "more of", "it"]
    tokenizer = {**BYTE_TOKENIZER, "tokens": tokens, "token_type": [1] * len(tokens)}
    path = write_gguf(tmp_path / "x.gguf", llama(), tokenizer=tokenizer)
    with pytest.raises(UserError, match="has 261 tokens, but only 260 rows in its embedding"):
        dequantize_gguf(path, tmp_path / "x")


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", llama()).read_bytes()
    for length in (0, 3, 4, 20, 100, 2000, 9000, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.gguf is not a readable GGUF file"):
            dequantize_gguf(tmp_path / "cut.gguf", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_an_array_that_is_longer_than_the_file_is_refused_at_once(tmp_path):
    content = bytearray(write_gguf(tmp_path / "x.gguf", llama()).read_bytes())
    name = b"tokenizer.ggml.token_type"
    length = content.index(name) + len(name) + 8  # after the types of the value and of its elements
    content[length : length + 8] = (2**60).to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"not a readable GGUF file \(it ends too early\)"):
        dequantize_gguf(tmp_path / "x.gguf", tmp_path / "x")


@pytest.mark.slow
def test_damaged_headers_end_in_a_sentence_or_in_a_model(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", llama(attention_bias=True)).read_bytes()
    header = GGUFReader(tmp_path / "whole.gguf").data_offset
    dice = random.Random(0)
    refused = 0
    for _ in range(cases(60)):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(header)] = dice.choice([0, 1, 128, 255, dice.randrange(256)])
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            shutil.rmtree(dequantize_gguf(tmp_path / "damaged.gguf", tmp_path / "made"))
        except UserError:
            refused += 1
        assert not (tmp_path / "made").exists()
    assert refused > cases(60) / 2
