"""Classes for uneven layers: a stock model where they are even, and all that transformers does with a model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, StaticCache

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import LayerwiseModel
from nemo_pvs.model.hf_classes import OURS, model_class
from nemo_pvs.model.shape import LayerSizes
from nemo_pvs.model.uneven_models import PrunedLlamaConfig, PrunedLlamaForCausalLM
from tests import families
from tests.state_source import StateSource, random_ids, tiny_model
from tests.uneven_model import (
    BIASES,
    LLAMA3_ROPE,
    SIZES,
    make_uneven,
    uneven_class,
    uneven_config,
    uneven_model,
)

every_family = pytest.mark.parametrize("family", families.LAYOUTS)


@torch.no_grad()
def logits(model, ids):
    return model(ids.long()).logits


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True, **BIASES}, {"rope_scaling": LLAMA3_ROPE}])
def test_even_layers_make_a_stock_llama(settings):
    stock = tiny_model(**settings)
    ours = PrunedLlamaForCausalLM(PrunedLlamaConfig(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    ids = random_ids(2, 40)
    assert torch.equal(logits(ours, ids), logits(stock, ids))


@every_family
def test_even_layers_make_a_stock_model_of_every_family(family):
    stock = families.tiny_model(family)
    ours = uneven_class(family)(uneven_class(family).config_class(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    ids = random_ids(2, 40)
    assert torch.equal(logits(ours, ids), logits(stock, ids))


def test_every_family_has_a_class_for_uneven_layers():
    named = {layout.uneven_class for layout in families.LAYOUTS.values()}
    assert named == {(ours.__name__, ours.config_class.model_type) for ours in OURS}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_theta": 50000.0, "rms_norm_eps": 1e-5, **BIASES}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
    ids=["llama with biases", "mistral with a window", "qwen2", "qwen3"],
)
def test_each_layer_is_a_stock_layer_of_its_sizes(family, settings):
    """Every layer of the model compared with a one-layer stock model with that layer's sizes and weights."""
    model = uneven_model(family=family, **settings)
    ids = random_ids(2, 30).long()
    states = model(ids, output_hidden_states=True).hidden_states
    for index, (ffn, heads, groups) in enumerate(SIZES[:-1]):  # the last state has gone through the final norm
        sizes = {"intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": groups}
        stock = families.tiny_model(family, num_hidden_layers=1, **sizes, **settings)
        stock.model.layers[0].load_state_dict(model.model.layers[index].state_dict())
        stock.model.norm = torch.nn.Identity()
        got = stock.model(inputs_embeds=states[index]).last_hidden_state
        torch.testing.assert_close(got, states[index + 1], rtol=0, atol=0)


def test_parameters_are_those_of_the_shape():
    model = uneven_model(tie_word_embeddings=False)
    shape = shape_of(StateSource(model))
    assert shape.uneven == SIZES
    assert shape.parameters == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_family
def test_auto_classes_load_what_was_saved(tmp_path, family, dtype):
    settings = BIASES if family == "llama" else {}
    folder = make_uneven(tmp_path / "hf", dtype, family=family, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert type(model) is uneven_class(family)
    assert model.dtype == dtype
    original = uneven_model(family=family, **settings).to(dtype).state_dict()
    assert original.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, original[name]) for name, weight in model.state_dict().items())
    config = AutoConfig.from_pretrained(folder)
    assert config.layer_shapes == json.loads((folder / "config.json").read_text())["layer_shapes"]
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, StaticCache])
def test_generation_with_a_cache_is_generation_without(cache):
    model = uneven_model(rope_scaling=LLAMA3_ROPE)
    ids = random_ids(2, 12).long()
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(
        ids, past_key_values=cache and cache(config=model.config, max_cache_len=40), use_cache=True, **settings
    )
    slow = ids
    for _ in range(20):
        slow = torch.cat([slow, logits(model, slow)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, slow)
    assert len(cached[0, 12:].unique()) > 3  # it does not merely repeat one token


def test_attention_can_be_switched():
    model = uneven_model()
    ids = random_ids(2, 30)
    before = logits(model, ids)
    assert all(layer.self_attn.config._attn_implementation == "sdpa" for layer in model.model.layers)
    model.set_attn_implementation("eager")
    assert all(layer.self_attn.config._attn_implementation == "eager" for layer in model.model.layers)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)


def test_the_number_of_entries_is_checked():
    with pytest.raises(ValueError, match="has 3 entries, but there are 4 layers"):
        PrunedLlamaConfig(**{**uneven_config().to_dict(), "layer_shapes": uneven_config().layer_shapes[:3]})


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, BIASES, {"tie_word_embeddings": True}, *({"family": family} for family in ("mistral", "qwen2", "qwen3"))],
)
def test_layer_by_layer_is_the_whole_model(tmp_path, settings):
    folder = make_uneven(tmp_path / "hf", **settings)
    ids = random_ids(3, 50)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    model = LayerwiseModel(HuggingFaceSource(folder))
    hidden = model.embed(ids)
    for index in range(model.shape.layers):
        model.run_layer(model.layer(index), hidden)
    got = torch.cat(list(model.logits(hidden))).view(3, 50, -1)
    torch.testing.assert_close(got, logits(reference, ids), rtol=1e-5, atol=1e-5)


def test_classes_are_looked_up_by_architecture():
    assert model_class({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}) is LlamaForCausalLM
    assert model_class(uneven_config().to_dict()) is PrunedLlamaForCausalLM
    with pytest.raises(UserError, match="FooForCausalLM"):
        model_class({"architectures": ["FooForCausalLM"]})


@pytest.mark.slow
def test_stock_transformers_names_the_model_type(tmp_path):
    """Without the import that the class's docstring names there is an error; with it the folder loads."""
    folder = make_uneven(tmp_path / "hf")
    load = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(folder)!r})"
    run = [sys.executable, "-c"]
    stock = subprocess.run([*run, load], capture_output=True, text=True)
    assert stock.returncode
    assert "`pruned_llama`" in stock.stderr
    assert not subprocess.run([*run, f"import nemo_pvs.modeling; {load}"]).returncode


def test_sizes_of_one_layer():
    config = uneven_config().at(2)
    assert LayerSizes(config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == SIZES[2]
    assert config.hidden_size == uneven_config().hidden_size
