"""Every family in ``conversions/``: there and back, and the same to transformers, to NeMo and to us."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.nemo import fiddle_json
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.nemo.context import read_context, write_context
from nemo_pvs.checkpoints.nemo.fiddle_json import Config, Symbol
from nemo_pvs.checkpoints.nemo.nemo_classes import NemoFamily
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import LayerwiseModel
from nemo_pvs.model.layout import Layout
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from tests.families import CASES, LAYOUTS, model_class, save_tiny, tiny_config
from tests.state_source import random_ids

every_case = pytest.mark.parametrize(
    ("family", "settings"), [case[::2] for case in CASES], ids=[f"{family} {about}" for family, about, _ in CASES]
)
every_family = pytest.mark.parametrize("family", LAYOUTS)


def test_every_table_is_tested():
    assert {family for family, _, _ in CASES} == LAYOUTS.keys(), "add the new family to tests/families.py"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_case
def test_there_and_back_is_bit_exact(family, settings, dtype, tmp_path):
    source = HuggingFaceSource(save_tiny(tmp_path / "hf", family, dtype, **settings))
    there = write_nemo(source, tmp_path / "nemo", pad_vocab_to_multiple=50)
    back = write_huggingface(NemoSource(tmp_path / "nemo"), tmp_path / "back")
    assert there.tensors == back.tensors
    assert there.source == back.source
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_text() == (tmp_path / "hf" / file).read_text()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert expected.keys() == final.keys()
    assert all(torch.equal(final[name], expected[name]) for name in expected)


@every_case
def test_the_config_can_be_rebuilt_from_what_nemo_knows(family, settings, tmp_path):
    config = tiny_config(family, **settings).to_dict()
    write_context(tmp_path / "c", {**config, "torch_dtype": "bfloat16"}, [], vocab_rows=128)
    (tmp_path / "c" / "huggingface_config.json").unlink()
    rebuilt = read_context(tmp_path / "c", vocab_rows=128, dtype="bfloat16")
    model_config = model_class(LAYOUTS[family]).config_class.from_dict(rebuilt)
    # Special tokens come with the generation config, which there is none of.
    known = {key: value for key, value in model_config.to_dict().items() if key not in {"dtype", "torch_dtype"}}
    assert known == {key: config.get(key) for key in known}
    assert LAYOUTS[family].shape(rebuilt) == LAYOUTS[family].shape(config)


@pytest.mark.slow
@every_case
def test_the_loss_layer_by_layer_is_that_of_the_whole_model(family, settings, tmp_path):
    folder = save_tiny(tmp_path, family, **settings)
    ids = random_ids(2, 60)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids.long(), labels=ids.long()).loss
    model = LayerwiseModel(HuggingFaceSource(folder))
    hidden = model.embed(ids)
    for index in range(model.shape.layers):
        model.run_layer(model.layer(index), hidden)
    total, count = model.losses(hidden[:, :-1], ids[:, 1:])
    assert total / count == pytest.approx(float(expected), rel=1e-5)


def test_sequences_longer_than_the_window_are_refused(tmp_path):
    model = LayerwiseModel(HuggingFaceSource(save_tiny(tmp_path, "mistral", sliding_window=64)))
    assert model.embed(random_ids(1, 64)).shape == (1, 64, 64)
    with pytest.raises(UserError, match=r"65 tokens do not fit .* 64 \(sliding_window\)"):
        model.embed(random_ids(1, 65))


@pytest.mark.slow
@every_case
def test_a_model_cut_by_the_table_is_the_model_with_those_parts_silenced(family, settings, tmp_path):
    """Layer 1, the last KV group of each layer and the first head of the others go; the parent without what they write
    is the oracle."""
    source = HuggingFaceSource(save_tiny(tmp_path / "parent", family, **settings))
    shape = LAYOUTS[family].shape(source.config)
    groups, per_group = tuple(range(shape.kv_groups - 1)), shape.heads_per_group
    heads = tuple(head for head in range(len(groups) * per_group) if head % per_group or per_group == 1)
    plan = Plan(
        method="test",
        parent=shape,
        target=shape.replace(layers=2, kv_groups=len(groups), heads=len(heads)),
        keep_layers=(0, 2),
        keep_hidden=tuple(range(shape.hidden)),
        keep_ffn=(tuple(range(shape.ffn)),) * 2,
        keep_kv_groups=(groups,) * 2,
        keep_heads=(heads,) * 2,
    )
    write_huggingface(PrunedSource(source, plan), tmp_path / "child")
    child = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "parent")
    ids = random_ids(2, 50).long()
    with torch.no_grad():
        for layer in oracle.model.layers:
            by_head = layer.self_attn.o_proj.weight.view(shape.hidden, shape.heads, shape.head_dim)
            by_head[:, [head for head in range(shape.heads) if head not in heads]] = 0
        for part in (oracle.model.layers[1].self_attn.o_proj, oracle.model.layers[1].mlp.down_proj):
            for parameter in part.parameters():
                parameter.zero_()
        torch.testing.assert_close(child(ids).logits, oracle(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_with_several_kinds_of_attention_are_not_dropped(family):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = {**tiny_config(family).to_dict(), "layer_types": kinds}
    shape = LAYOUTS[family].shape(config)
    assert LAYOUTS[family].config(shape, config)["layer_types"] == kinds
    with pytest.raises(UserError, match="full_attention, sliding_attention"):
        LAYOUTS[family].config(shape.replace(layers=2), config)


@every_family
def test_a_fresh_model_has_norms_of_one_and_biases_of_zero(family):
    config = tiny_config(family, attention_bias=True).to_dict()
    layout = LAYOUTS[family]
    source = RandomSource(config, seed=0)
    for name in layout.parts(layout.shape(config)):
        if "norm" in name:
            assert source.read(name).eq(1).all(), name
        elif name.endswith(".bias"):
            assert source.read(name).eq(0).all(), name
        else:
            assert source.read(name).std() > 0, name


@every_family
def test_what_config_json_leaves_out_is_what_transformers_assumes(family):
    layout = LAYOUTS[family]
    assumed = model_class(layout).config_class()
    for key, value in {**layout.defaults, **layout.fixed}.items():
        assert getattr(assumed, key) == value, key
    sizes = {"head_dim", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"}
    sizes |= {"num_key_value_heads", "tie_word_embeddings"}  # of these Shape knows what is assumed
    assert NemoFamily(layout).fields.keys() - sizes <= layout.defaults.keys()


@every_family
def test_a_family_that_nemo_lacks_stays_in_the_hugging_face_format(family):
    table = {key: value for key, value in LAYOUTS[family].table.items() if key != "nemo"}
    with pytest.raises(
        UserError, match=rf"No NeMo classes are known for the family {family}.*conversions/{family}\.yaml"
    ):
        NemoFamily(Layout(family, table))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "qwen2 has use_sliding_window False, not True"),
        ("qwen3", {"use_sliding_window": True}, "qwen3 has use_sliding_window False, not True"),
        ("mistral", {"hidden_act": "gelu"}, "mistral has hidden_act silu, not gelu"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "is yarn, which NeMo's qwen2 lacks"),
        ("mistral", {"rope_scaling": {"rope_type": "llama3"}}, "is llama3, which NeMo's mistral lacks"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "is dynamic, .* only llama3 or no scaling can be converted"),
        ("llama", {"attention_bias": True}, "has only attention_bias"),
        ("llama", {"mlp_bias": True}, "has only mlp_bias"),
        ("qwen3", {"attention_bias": True}, "has only attention_bias"),
    ],
)
def test_what_nemo_cannot_express_is_refused(family, change, message, tmp_path):
    config = {**tiny_config(family).to_dict(), "torch_dtype": "float32", **change}
    with pytest.raises(UserError, match=message):
        write_context(tmp_path / "c", config, [], vocab_rows=128)
    assert not (tmp_path / "c").exists()


def test_no_weight_is_written_of_a_model_that_nemo_cannot_express(tmp_path):
    source = HuggingFaceSource(save_tiny(tmp_path / "hf", "qwen2", rope_scaling={"rope_type": "yarn", "factor": 2.0}))
    with pytest.raises(UserError, match="rope_scaling of this model is yarn, which NeMo's qwen2 lacks"):
        write_nemo(source, tmp_path / "nemo", progress=lambda done, total: pytest.fail("it wrote weights"))
    assert not (tmp_path / "nemo").exists()


def write_stock(folder, family, fields):
    """Write an io.json with explicit fields, as NeMo does for a model built from the plain class of a family."""
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2}
    config = Config(NemoFamily(LAYOUTS[family]).config, {**sizes, **fields})
    model = Config(Symbol("x", "Model"), {"config": config, "tokenizer": None})
    (folder / "io.json").write_text(json.dumps(fiddle_json.dump(Config(Symbol("x", "Context"), {"model": model}))))
    return folder


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "add_qkv_bias", True),
        ("llama", "qk_layernorm", True),
        ("llama", "window_size", [64, 0]),
        ("mistral", "add_bias_linear", True),
        ("qwen2", "add_qkv_bias", False),
        ("qwen2", "add_bias_linear", True),
        ("qwen3", "qk_layernorm", False),
        ("qwen3", "num_moe_experts", 8),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(family, field, value, tmp_path):
    with pytest.raises(UserError, match=rf"{field}=.*which a {family} in the Hugging Face format cannot have"):
        read_context(write_stock(tmp_path, family, {field: value}), vocab_rows=8, dtype="float32")


def test_windows_of_stock_classes(tmp_path):
    def window(**fields: Any) -> Any:
        config = read_context(write_stock(tmp_path, "mistral", fields), vocab_rows=8, dtype="float32")
        return config["sliding_window"]

    assert window() == 4096
    assert window(window_size=None) is None
    assert window(window_size=[96, 0]) == 96


@pytest.fixture(scope="module")
def nemo():
    from nemo.lightning import io

    return io


@pytest.mark.slow
@every_family
def test_the_table_of_classes_is_that_of_the_installed_nemo(nemo, family):
    import importlib

    nemo_family = NemoFamily(LAYOUTS[family])
    told = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "add_bias_linear"}
    told |= set(nemo_family.fields.values()) | nemo_family.fixed.keys()
    if nemo_family.rope_scaling:
        told |= set(nemo_family.rope_scaling.fields.values())
    for symbol in nemo_family.classes:
        module = importlib.import_module(symbol.module)
        class_fields = {field.name: field for field in dataclasses.fields(getattr(module, symbol.name))}
        actual = {
            name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for name, field in class_fields.items()
            if name in told
        }
        # GPTConfig has no sizes; a checkpoint of a class without them states them.
        actual = {name: value for name, value in actual.items() if value is not dataclasses.MISSING}
        base_sizes = {"num_layers": 0, "hidden_size": 0, "num_attention_heads": 0, "ffn_hidden_size": None}
        actual = {name: value for name, value in actual.items() if base_sizes.get(name, ...) != value}
        assert {**nemo_family.fixed, **nemo_family.defaults(symbol)} == actual, symbol.name
    assert hasattr(module, nemo_family.model.name)
    assert nemo_family.config in nemo_family.classes


@pytest.mark.slow
@every_case
def test_stock_nemo_builds_the_model_that_the_checkpoint_describes(nemo, family, settings, tmp_path):
    import fiddle

    write_nemo(HuggingFaceSource(save_tiny(tmp_path / "hf", family, **settings)), tmp_path / "nemo")
    model = nemo.load_context(tmp_path / "nemo" / "context", subpath="model", build=False)
    nemo_family = NemoFamily(LAYOUTS[family])
    assert model.__fn_or_cls__.__name__ == nemo_family.model.name
    for kernel in ("apply_rope_fusion", "persist_layer_norm"):  # which need Transformer Engine and Apex
        setattr(model.config, kernel, False)
    built = fiddle.build(model.config)
    biased = bool(settings.get("attention_bias"))
    assert (built.add_bias_linear, built.add_qkv_bias, built.qk_layernorm) == (
        biased,
        family == "qwen2",
        family == "qwen3",
    )
    assert (built.num_layers, built.hidden_size, built.kv_channels) == (3, 64, 16)
    window = settings.get("sliding_window")
    assert built.window_size == (None if window is None else [window, 0])


@pytest.mark.slow
@every_case
def test_we_read_the_context_that_nemo_dumps(nemo, family, settings, tmp_path):
    """A model built and dumped by NeMo, as its training loop does, is read back with the values it was built from."""
    import importlib

    from nemo.lightning.io.pl import TrainerContext

    before = HuggingFaceSource(save_tiny(tmp_path / "hf", family, **settings)).config
    write_nemo(HuggingFaceSource(tmp_path / "hf"), tmp_path / "nemo")
    stored = nemo.load_context(tmp_path / "nemo" / "context", subpath="model.config", build=False)
    nemo_family = NemoFamily(LAYOUTS[family])
    module = importlib.import_module(nemo_family.config.module)
    fields = {**stored.__arguments__, "apply_rope_fusion": False, "persist_layer_norm": False}
    model = getattr(module, nemo_family.model.name)(getattr(module, nemo_family.config.name)(**fields))
    TrainerContext(model=model, trainer=None, extra={}).io_dump(tmp_path / "dumped", yaml_attrs=[])
    after = read_context(tmp_path / "dumped", vocab_rows=128, dtype="float32")
    common = before.keys() & after.keys() - {"torch_dtype", "dtype"}
    assert {key: after[key] for key in common} == {key: before[key] for key in common}


# What NeMo's own importers do not carry over from a Hugging Face config.
LOST_BY_NEMO = {
    "llama": set(),
    "mistral": {"seq_length", "vocab_size", "share_embeddings_and_output_weights"},
    "qwen2": {"kv_channels", "share_embeddings_and_output_weights"},
    "qwen3": {"kv_channels", "max_position_embeddings"},
}


@pytest.mark.slow
@every_case
def test_we_say_what_nemos_importer_says(nemo, family, settings, tmp_path, monkeypatch):
    import importlib

    from megatron.core.models.common.embeddings import rope_utils

    # NeMo's Llama config refuses to be built without the fused kernel, which is not called here.
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", rope_utils.apply_rotary_pos_emb)
    if settings.get("attention_bias"):
        pytest.skip("NeMo's importer leaves biases out")
    folder = save_tiny(tmp_path / "hf", family, torch.bfloat16, **settings)
    write_nemo(HuggingFaceSource(folder), tmp_path / "nemo")
    ours = nemo.load_context(tmp_path / "nemo" / "context", subpath="model.config", build=False).__arguments__
    nemo_family = NemoFamily(LAYOUTS[family])
    module = importlib.import_module(nemo_family.config.module)
    importer = getattr(module, f"HF{nemo_family.model.name.removesuffix('Model')}Importer")(folder)
    importer.trust_remote_code = False
    theirs = importer.config
    kept = ours.keys() - LOST_BY_NEMO[family]
    assert {field: getattr(theirs, field) for field in kept} == {field: ours[field] for field in kept}
