"""Hugging Face to NeMo and back is the identity, whatever the shape, the dtypes, the split and the order of keys."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.model.layout import Layout
from tests.conftest import cases

CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@st.composite
def configs(draw):
    """Draw the config of a tiny Llama; nothing in it divides anything that need not."""
    groups = draw(st.integers(1, 3))
    has_attention_bias, has_mlp_bias = draw(st.sampled_from([(False, False), (True, True)]))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": draw(st.integers(1, 4)),
        "hidden_size": draw(st.integers(1, 9)),
        "intermediate_size": draw(st.integers(1, 9)),
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([2, 4, 6])),
        "vocab_size": draw(st.integers(1, 17)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": has_attention_bias,
        "mlp_bias": has_mlp_bias,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": draw(st.sampled_from([10000.0, 500000.0])),
        "torch_dtype": "bfloat16",
    }


def random_bits(size, dtype, generator):
    """Return finite numbers of every magnitude, subnormal ones and both zeros included."""
    tensor = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-45, 5, size, generator=generator)
    return (tensor * (torch.rand(size, generator=generator) > 0.1)).to(dtype)


def write_shard(path, names, tensors, order):
    """Write safetensors by hand: the data in the order of ``names``, the header's keys in another."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name in names:
        content = tensors[name].view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": CODES[tensors[name].dtype], "shape": [*tensors[name].shape], "data_offsets": offsets}
        data += content
    keys = order.sample(sorted(header), len(header))
    encoded = json.dumps({key: header[key] for key in keys}).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_model(folder, config, tensors, shards, order):
    names = order.sample(sorted(tensors), len(tensors))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_shard(folder / "model.safetensors", names, tensors, order)
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_shard(folder / file, names[number::shards], tensors, order)
        weight_map.update(dict.fromkeys(names[number::shards], file))
    index = {"metadata": {}, "weight_map": dict(order.sample(sorted(weight_map.items()), len(weight_map)))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.slow
@settings(max_examples=cases(25), derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=configs(),
    matrix_dtype=st.sampled_from(sorted(CODES, key=str)),
    vector_dtype=st.sampled_from(sorted(CODES, key=str)),
    shards=st.integers(1, 4),
    shard_bytes=st.sampled_from([1, 300, 10**9]),
    padding=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_there_and_back_is_the_identity(config, matrix_dtype, vector_dtype, shards, shard_bytes, padding, seed):
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    layout = Layout.for_config(config)
    shape = layout.shape(config)
    sizes = {name: part.size(shape) for name, (part, _) in layout.parts(shape).items()}
    dtypes = {name: vector_dtype if len(size) == 1 else matrix_dtype for name, size in sizes.items()}
    tensors = {name: random_bits(size, dtypes[name], generator) for name, size in sizes.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "hf", config, tensors, shards, order)
        there = convert(folder / "hf", folder / "nemo", to="nemo", pad_vocab_to_multiple=padding)
        back = convert(folder / "nemo", folder / "back", to="hf", max_shard_bytes=shard_bytes)
        assert there.tensors == back.tensors
        final = open_source(folder / "back")
        assert {*final._parts} == {*tensors}
        for name, tensor in tensors.items():
            copy = final.read(name)
            assert copy.dtype == tensor.dtype
            assert copy.shape == tensor.shape
            assert torch.equal(copy.view(torch.uint8), tensor.view(torch.uint8)), name
        rewritten = json.loads((folder / "back" / "config.json").read_text())
        assert {**config, "torch_dtype": rewritten["torch_dtype"]} == rewritten
