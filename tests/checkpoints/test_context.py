from __future__ import annotations

import json

import pytest

from nemo_pvs.checkpoints.nemo import fiddle_json
from nemo_pvs.checkpoints.nemo.context import context_assets, read_context, write_context
from nemo_pvs.checkpoints.nemo.fiddle_json import Config, Symbol
from nemo_pvs.errors import UserError

LLAMA = "nemo.collections.llm.gpt.model.llama"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 250000.0,
    "rope_scaling": None,
    "initializer_range": 0.03,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 4096,
}


def write_stock(folder, name, fields, *, module=LLAMA, tokenizer=None):
    """Write an io.json with the given class and explicit fields, as NeMo does for a model built from it."""
    model = {"config": Config(Symbol(module, name), fields), "tokenizer": tokenizer}
    context = Config(Symbol("x", "TrainerContext"), {"model": Config(Symbol("x", "LlamaModel"), model)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "io.json").write_text(json.dumps(fiddle_json.dump(context)))
    return folder


def rebuilt(folder, **given):
    (folder / "huggingface_config.json").unlink(missing_ok=True)
    return read_context(folder, **{"vocab_rows": 100, "dtype": "bfloat16", **given})


def test_every_field_is_explicit(tmp_path):
    write_context(tmp_path / "c", CONFIG, [], vocab_rows=128)
    config = fiddle_json.find(json.loads((tmp_path / "c" / "io.json").read_text()), "<root>.model.config")
    assert config.symbol == Symbol("nemo.collections.llm.gpt.model.llama", "LlamaConfig")
    assert config.arguments == {
        "num_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 16,
        "vocab_size": 128,
        "seq_length": 512,
        "layernorm_epsilon": 1e-6,
        "rotary_base": 250000.0,
        "init_method_std": 0.03,
        "share_embeddings_and_output_weights": True,
        "add_bias_linear": False,
        "bf16": True,
        "fp16": False,
        "params_dtype": Symbol("torch", "bfloat16"),
    }


def test_the_whole_rope_scaling_is_carried(tmp_path):
    write_context(tmp_path / "c", {**CONFIG, "rope_scaling": LLAMA3_ROPE}, [], vocab_rows=100)
    config = fiddle_json.find(json.loads((tmp_path / "c" / "io.json").read_text()), "<root>.model.config")
    assert config.symbol.name == "Llama31Config"
    names = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    assert [config.arguments[name] for name in names] == [32.0, 1.5, 3.0, 4096]


def test_what_config_json_leaves_out_is_what_transformers_assumes(tmp_path, tiny_llama_config):
    assumed = tiny_llama_config().__class__()
    left_out = ("max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range", "rope_scaling")
    sparse = {key: value for key, value in CONFIG.items() if key not in left_out}
    write_context(tmp_path / "c", sparse, [], vocab_rows=100)
    config = rebuilt(tmp_path / "c")
    assert {key: config[key] for key in left_out} == {key: getattr(assumed, key) for key in left_out}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, LLAMA3_ROPE])
def test_the_config_can_be_rebuilt_from_what_nemo_knows(tmp_path, scaling):
    config = {**CONFIG, "rope_scaling": scaling}
    write_context(tmp_path / "c", config, [], vocab_rows=100)
    expected = {**config, "model_type": "llama", "rope_scaling": LLAMA3_ROPE if scaling == LLAMA3_ROPE else None}
    assert read_context(tmp_path / "c", vocab_rows=100, dtype="bfloat16") == expected
    again = rebuilt(tmp_path / "c")
    assert {key: again[key] for key in expected} == expected


def test_an_untold_vocabulary_is_that_of_the_embedding(tmp_path):
    fields = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2}
    config = rebuilt(write_stock(tmp_path, "LlamaConfig", fields), vocab_rows=77)
    assert (config["vocab_size"], config["num_key_value_heads"], config["head_dim"]) == (77, 2, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # the config.json of the models on Hugging Face
        ("Llama2Config7B", (32, 4096, 11008, 32, 32, 128, 10000.0, None, False)),
        ("Llama3Config8B", (32, 4096, 14336, 32, 8, 128, 500000.0, None, False)),
        ("Llama31Config8B", (32, 4096, 14336, 32, 8, 128, 500000.0, 8.0, False)),
        ("Llama32Config1B", (16, 2048, 8192, 32, 8, 64, 500000.0, 32.0, True)),
        ("Llama32Config3B", (28, 3072, 8192, 24, 8, 128, 500000.0, 32.0, True)),
    ],
)
def test_stock_classes_speak_for_what_a_checkpoint_leaves_out(tmp_path, name, expected):
    config = rebuilt(write_stock(tmp_path, name, {}), vocab_rows=128256)
    assert config["rms_norm_eps"] == 1e-5
    keys = "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"
    keys += "head_dim", "rope_theta"
    values = tuple(config[key] for key in keys)
    factor = (config["rope_scaling"] or {}).get("factor")
    assert (*values, factor, config["tie_word_embeddings"]) == expected


def test_special_tokens_come_from_the_generation_config(tmp_path):
    folder = write_stock(tmp_path, "Llama31Config8B", {})
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "generation_config.json").write_text('{"bos_token_id": 128000, "eos_token_id": [1, 2]}')
    config = rebuilt(folder)
    assert (config["bos_token_id"], config["eos_token_id"]) == (128000, [1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "llama has hidden_act silu, not gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of this model is yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of this model is linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor, high_freq_factor"),
    ],
)
def test_what_nemo_cannot_express_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write_context(tmp_path / "c", {**CONFIG, **change}, [], vocab_rows=100)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Llama4Config", {}, r"Llama4Config, which no table in conversions/ lists"),
        ("LlamaConfig", {"num_layers": 2}, "does not state hidden_size, num_attention_heads, ffn_hidden_size"),
        ("Llama31Config8B", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("Llama31Config8B", {"seq_len_interpolation_factor": 4.0}, r"seq_len_interpolation_factor=4\.0"),
        ("Llama2Config7B", {"normalization": "LayerNorm"}, "normalization=LayerNorm"),
        ("Llama2Config7B", {"activation_func": Symbol("torch.nn.functional", "gelu")}, "activation_func=.*gelu"),
        ("Llama2Config7B", {"softmax_scale": 0.5}, r"softmax_scale=0\.5"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(tmp_path, name, fields, message):
    with pytest.raises(UserError, match=message):
        rebuilt(write_stock(tmp_path, name, fields))


def test_a_kept_config_is_read_like_any_other(tmp_path):
    write_context(tmp_path / "c", CONFIG, [], vocab_rows=100)
    path = tmp_path / "c" / "huggingface_config.json"
    moved = {key: value for key, value in CONFIG.items() if key not in {"rope_theta", "rope_scaling", "architectures"}}
    parameters = {**LLAMA3_ROPE, "rope_theta": 250000.0}
    path.write_text(json.dumps({**moved, "model_type": "llama", "rope_parameters": parameters}))
    config = read_context(tmp_path / "c", vocab_rows=100, dtype="bfloat16")
    assert config == {**CONFIG, "model_type": "llama", "rope_scaling": LLAMA3_ROPE}
    path.write_text(json.dumps({**CONFIG, "attn_logit_softcapping": 50.0}))
    with pytest.raises(UserError, match=r"huggingface_config\.json sets attn_logit_softcapping to 50"):
        read_context(tmp_path / "c", vocab_rows=100, dtype="bfloat16")


def test_the_activation_may_be_stated(tmp_path):
    silu = {"activation_func": Symbol("torch.nn.functional", "silu")}
    assert rebuilt(write_stock(tmp_path, "Llama31Config8B", silu))["hidden_act"] == "silu"


def test_a_class_of_the_same_name_from_elsewhere_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"somewhere\.LlamaConfig"):
        rebuilt(write_stock(tmp_path, "LlamaConfig", {}, module="somewhere"))


@pytest.mark.parametrize("content", ["{}", "[]", '{"objects": {"a": {"paths": ["<root>.model.config"]}}}'])
def test_a_context_without_a_model_is_refused(tmp_path, content):
    (tmp_path / "io.json").write_text(content)
    with pytest.raises(UserError, match="does not describe a model"):
        rebuilt(tmp_path)


def test_a_missing_context_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"io\.json does not exist"):
        rebuilt(tmp_path / "context")


def test_assets_are_kept_where_nemo_looks_for_them(tmp_path):
    names = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        (tmp_path / name).write_text(json.dumps(name))
    write_context(tmp_path / "c", CONFIG, [tmp_path / name for name in names], vocab_rows=100)
    assert (tmp_path / "c" / "artifacts" / "generation_config.json").read_text() == json.dumps(names[0])
    assert (tmp_path / "c" / "tokenizer" / "tokenizer.json").read_text() == json.dumps(names[1])
    (tmp_path / "c" / "tokenizer" / "tokenizer.model").write_bytes(b"GGUF: weights in disguise")
    assert [path.name for path in context_assets(tmp_path / "c")] == names
    tokenizer = fiddle_json.find(json.loads((tmp_path / "c" / "io.json").read_text()), "<root>.model.tokenizer")
    assert tokenizer.arguments == {"pretrained_model_name": "tokenizer"}


@pytest.mark.parametrize("place", ["../secret", "/etc", "meta-llama/Llama-3.1-8B", None])
def test_a_tokenizer_outside_the_context_is_not_followed(tmp_path, place):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").touch()
    tokenizer = Config(Symbol("x", "AutoTokenizer"), {"pretrained_model_name": place})
    assert context_assets(write_stock(tmp_path / "c", "LlamaConfig", {}, tokenizer=tokenizer)) == ()


def test_metadata_may_be_a_reference_as_fiddle_writes_it():
    document = fiddle_json.dump(Config(Symbol("a", "B"), {"x": 1, "y": Symbol("c", "d")}))
    document["objects"]["m"] = document["objects"]["b_1"]["metadata"]
    document["objects"]["b_1"]["metadata"] = {"type": "ref", "key": "m"}
    assert fiddle_json.find(document, "<root>") == Config(Symbol("a", "B"), {"x": 1, "y": Symbol("c", "d")})
    assert fiddle_json.find(document, "<root>.x") is None
