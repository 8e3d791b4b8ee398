"""One normal form for the configs of all versions of Transformers, and no setting that is silently not computed."""

from __future__ import annotations

import copy

import pytest

from nemo_pvs.checkpoints.huggingface.config import normal_config
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from tests.conftest import tiny_llama_config
from tests.families import LAYOUTS, tiny_config
from tests.uneven_model import uneven_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}


def config_with(drop=(), **settings):
    config = tiny_llama_config().to_dict()
    return {key: value for key, value in {**config, **settings}.items() if key not in drop}


def rope_of(**settings):
    """Return base and scaling of a config that states nothing else of the rotary embedding."""
    config = normal_config(config_with(("rope_theta", "rope_scaling")) | settings, "config.json")
    assert "rope_parameters" not in config
    assert type(config["rope_theta"]) is float
    return config["rope_theta"], config.get("rope_scaling")


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},  # Transformers 4
        {"rope_theta": 500000, "rope_scaling": {**LLAMA3, "factor": 8}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {("type" if key == "rope_type" else key): LLAMA3[key] for key in LLAMA3},
        },
        {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},  # Transformers 5
        {"rope_theta": 500000.0, "rope_parameters": LLAMA3},
        {
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
        },  # 5, then 4
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        {"rope_scaling": {**LLAMA3, "rope_theta": 500000.0}},
    ],
)
def test_every_spelling_of_the_rotary_embedding_is_the_same(settings):
    assert rope_of(**settings) == (500000.0, LLAMA3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 10000.0),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0),
        ({"rope_scaling": {}}, 10000.0),
        ({"rope_parameters": DEFAULT}, 500000.0),
        ({"rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": DEFAULT}, 500000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 10000.0),
        ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 1.0, "factor": None}}, 500000.0),
    ],
)
def test_a_rotary_embedding_without_scaling(settings, expected):
    assert rope_of(**settings) == (expected, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_theta": 500000.0, "rope_parameters": {"rope_theta": 10000.0}}, r"several bases .*\(10000, 500000\)"),
        ({"rope_theta": 20000.0, "rope_parameters": DEFAULT}, r"several bases .*\(500000, 20000\)"),
        ({"rope_theta": 20000.0, "rope_scaling": {**LLAMA3, "rope_theta": 30000.0}}, "several bases"),
        ({"rope_scaling": LLAMA3, "rope_parameters": DEFAULT}, "a rope_scaling other than that in rope_parameters"),
        ({"rope_scaling": {**LLAMA3, "factor": 4.0}, "rope_parameters": LLAMA3}, "a rope_scaling other than that"),
        ({"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}}, "one dictionary of settings"),
        ({"rope_parameters": [1]}, r"has \[1\] for rope_parameters, which must be a dictionary"),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "contradicts itself"),
        ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "no supported family computes"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 128}, "contradicts itself"),
        ({"rope_scaling": {"rope_type": 3, "factor": 2.0}}, "contradicts itself"),
        ({"rope_theta": 10**400}, "for rope_theta, which must be a positive number"),
        ({"rope_theta": "many"}, "'many' for rope_theta, which must be a positive number"),
        ({"rope_theta": True}, "True for rope_theta"),
        ({"rope_parameters": {"rope_theta": -1}}, "-1 for rope_theta"),
    ],
)
def test_a_contradiction_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        rope_of(**settings)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_config_in_normal_form_stays_as_it_is(family):
    config = tiny_config(family).to_dict()
    architecture, _ = LAYOUTS[family].even_class
    before = copy.deepcopy({**config, "architectures": [architecture]})
    once = normal_config(before, "config.json")
    assert before == {**config, "architectures": [architecture]}  # the caller's is left alone
    assert once == before
    assert normal_config(once, "config.json") == once


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_context_that_is_not_stated_is_that_of_the_class(family):
    config = tiny_config(family).to_dict()
    del config["max_position_embeddings"]
    default = type(tiny_config(family))().max_position_embeddings
    for stated in ({}, {"max_position_embeddings": None}):
        assert normal_config({**config, **stated}, "config.json")["max_position_embeddings"] == default


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("stated", [{}, {"architectures": None}, {"architectures": []}])
def test_without_architectures_model_type_decides(family, stated):
    config = {key: value for key, value in tiny_config(family).to_dict().items() if key != "architectures"}
    architecture, model_type = LAYOUTS[family].even_class
    assert normal_config({**config, **stated}, "config.json")["architectures"] == [architecture]
    assert normal_config({**config, "architectures": ["Own", architecture], "model_type": None}, "c") == normal_config(
        {**config, "model_type": model_type}, "c"
    )


@pytest.mark.parametrize(
    ("layer_shapes", "message"),
    [
        ([], "sizes of at least one layer"),
        (
            [{"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 0}],
            "kv_groups of every layer",
        ),
        (
            [{"intermediate_size": 8, "num_attention_heads": "2", "num_key_value_heads": 1}],
            "heads of every layer",
        ),
        ([{"intermediate_size": 8}], "lacks 'num_attention_heads'"),
    ],
)
def test_impossible_sizes_of_layers_are_refused(layer_shapes, message):
    config = uneven_config().to_dict() | {"layer_shapes": layer_shapes}
    with pytest.raises(UserError, match=message):
        Layout.for_config(config).shape(config)


def test_our_class_for_uneven_layers_is_known_by_its_model_type():
    config = normal_config(config_with(("architectures",), model_type="pruned_llama"), "config.json")
    assert config["architectures"] == ["PrunedLlamaForCausalLM"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architectures": 1},
            r'config\.json has 1 for architectures, which must be a list of names, .* \["LlamaForCausalLM"\]',
        ),
        ({"architectures": "LlamaForCausalLM"}, "for architectures, which must be a list of names"),
        ({"architectures": [1]}, "for architectures, which must be a list of names"),
        ({"model_type": 1}, "has 1 for model_type"),
        ({"model_type": "mistral"}, "architectures is LlamaForCausalLM, but model_type is mistral"),
        ({"model_type": "granite"}, "architectures is LlamaForCausalLM, but model_type is granite"),
        ({"architectures": ["GraniteForCausalLM"]}, "No weight table for architecture GraniteForCausalLM"),
        ({"architectures": None, "model_type": "granite"}, "No weight table for model_type granite"),
    ],
)
def test_class_names_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        normal_config(config_with(**settings), "config.json")


@pytest.mark.parametrize("config", [[], None, "llama"])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(UserError, match=r"config\.json is not a model's configuration"):
        normal_config(config, "config.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention_multiplier": 0.0078125},
            "sets attention_multiplier to 0.0078125, which LlamaForCausalLM does not",
        ),
        ({"logits_scaling": 8.0}, "sets logits_scaling to 8"),
        ({"partial_rotary_factor": 0.5}, "sets partial_rotary_factor to 0.5"),
        ({"use_bidirectional_attention": True}, "sets use_bidirectional_attention to True"),
        ({"is_causal": False}, "sets is_causal to False"),
        ({"per_layer_config": {"1": {"rms_norm_eps": 1e-3}}}, "sets per_layer_config to {'1': {'rms_norm_eps"),
        ({"sliding_window": 32}, "sets sliding_window to 32"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding_attention among its layer_types"),
        ({"layer_types": ["full_attention"]}, "one entry in layer_types per layer \\(4\\)"),
        ({"layer_types": 4}, "has 4 for layer_types, which must be a list of names"),
    ],
)
def test_a_setting_that_is_not_computed_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        normal_config(config_with(**settings), "config.json")


@pytest.mark.parametrize(
    "settings",
    [
        {"pretraining_tp": 2},  # the same function, in slices
        {"logits_scaling": 1.0, "attention_multiplier": None, "partial_rotary_factor": 1, "is_causal": True},
        {"per_layer_config": {}},  # all layers alike, in Transformers 5
        {"sliding_window": 256},  # the whole context
        {"layer_types": ["full_attention"] * 4},
    ],
)
def test_a_setting_that_changes_nothing_is_kept(settings):
    assert normal_config(config_with(**settings), "config.json") == config_with(**settings)


@pytest.mark.parametrize(
    ("family", "settings", "fits"),
    [
        ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, True),
        ("mistral", {"sliding_window": None, "layer_types": ["full_attention"] * 3}, True),
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 3}, False),
        ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, False),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "layer_types": ["full_attention"] * 3}, True),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, False),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, True),
    ],
)
def test_windows_are_those_that_the_class_computes(family, settings, fits):
    config = {**tiny_config(family).to_dict(), "num_hidden_layers": 3, **settings}
    if fits:
        assert normal_config(config, "config.json")["layer_types"] == settings["layer_types"]
    else:
        with pytest.raises(UserError, match="among its layer_types"):
            normal_config(config, "config.json")


def test_layers_cannot_change_their_number_where_max_window_layers_tells_them_apart():
    config = {**tiny_config("qwen2").to_dict(), "num_hidden_layers": 4, "layer_types": None}
    config = normal_config({**config, "use_sliding_window": True, "max_window_layers": 2}, "config.json")
    layout = Layout.for_config(config)
    shape = layout.shape(config)
    assert layout.config(shape, config)["num_hidden_layers"] == 4
    with pytest.raises(UserError, match="their number cannot be changed"):
        layout.config(shape.replace(layers=3), config)
    config["max_window_layers"] = 4  # no layer has a window
    assert layout.config(shape.replace(layers=3), config)["num_hidden_layers"] == 3
