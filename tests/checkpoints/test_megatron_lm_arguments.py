"""Checkpoints of Megatron-LM: their arguments are read as data, and say what the model is."""

from __future__ import annotations

import argparse
import json
import shutil
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.files.torch_dist import TensorBlock, TorchDistReader, write_torch_dist
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.megatron.source import MegatronSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import UserError
from tests.megatron.ranks import run_ranks

from .conftest import Bomb, assert_same

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def megatron_args(**changes):
    """Return the arguments, those that matter and some that do not, of a Megatron-LM run of the tiny Llama."""
    from megatron.core.transformer.enums import AttnBackend

    values = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 16,
        "max_position_embeddings": 256,
        "norm_epsilon": 1e-6,
        "rotary_base": 10000,
        "init_method_std": 0.02,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "vocab_size": 128,
        "padded_vocab_size": 150,
        "params_dtype": torch.bfloat16,
        "attention_backend": AttnBackend.auto,
        "data_path": ["0.5", "text"],
        "qk_layernorm": False,
        "rotary_percent": 1.0,
    }
    return argparse.Namespace(**{**values, **changes})


def as_megatron_lm(nemo, folder, args=None):
    """Write the weights of a NeMo checkpoint as Megatron-LM does: no prefix, no context, arguments."""
    reader = TorchDistReader(nemo / "weights")
    blocks = []
    for name in reader.names:
        size = reader.size(name)
        zero = (0,) * len(size)
        blocks.append(
            TensorBlock(
                name.removeprefix("module."),
                size,
                zero,
                size,
                reader.dtype(name),
                lambda name=name, zero=zero, size=size: reader.read(name, zero, size),
            )
        )
    write_torch_dist(folder, blocks, [])
    if args is not None:
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 100}, folder / "common.pt")
    return folder


@pytest.fixture
def iteration(hf, tmp_path):
    write_nemo(HuggingFaceSource(hf), tmp_path / "nemo", pad_vocab_to_multiple=50)
    return as_megatron_lm(tmp_path / "nemo", tmp_path / "run" / "iter_0000100", megatron_args())


@pytest.mark.slow
def test_arguments_are_read_where_megatron_is_not_there(python, iteration):
    """Megatron-Core allows its own classes for the whole process, this one; so ask another."""
    rerun = {"mode": types.SimpleNamespace(a=1), "state": np.random.RandomState(0).get_state()}
    args = megatron_args(save=Path("a/b"))
    torch.save({"args": args, "rerun_state_machine": rerun, "rng": np.arange(3)}, iteration / "common.pt")
    script = (
        "import sys; from nemo_pvs.checkpoints.open import open_source;"
        f"print(open_source({str(iteration)!r}).config['head_dim'], 'megatron' in sys.modules)"
    )
    assert python("-c", script).output.split() == ["16", "False"]


@pytest.mark.slow
def test_arguments_of_megatron_lm_are_config_enough(iteration, hf, tmp_path):
    source, original = open_source(iteration), HuggingFaceSource(hf)
    assert type(source) is MegatronSource
    assert_same(source, original)
    assert {key: source.config[key] for key in source.config if key in original.config} == {
        key: original.config.get(key) for key in source.config if key in original.config
    }
    assert source.assets == ()
    back = convert(iteration, tmp_path / "back", to="hf")
    assert back.tensors == convert(hf, tmp_path / "copy", to="hf").tensors
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (hf, tmp_path / "back")]
    ids = torch.arange(50)[None]
    assert torch.equal(*(model(ids).logits for model in models))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_rope_scaling": True, "rope_scaling_factor": 8.0}, {"rope_scaling": ROPE}),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, {"rope_scaling": {**ROPE, "factor": 32.0}}),
        ({"use_rope_scaling": False, "rope_scaling_factor": 8.0}, {"rope_scaling": None}),
        ({"vocab_size": None}, {"vocab_size": 150}),
        ({"norm_epsilon": 1e-5, "rotary_base": 500000}, {"rms_norm_eps": 1e-5, "rope_theta": 500000}),
    ],
)
def test_each_argument_has_its_place(iteration, changes, expected):
    torch.save({"args": megatron_args(**changes)}, iteration / "common.pt")
    config = open_source(iteration).config
    assert {key: config[key] for key in expected} == expected


def test_tied_embeddings_without_grouped_queries(make_tiny_llama, tmp_path):
    """Megatron-LM leaves num_query_groups at 1 when it does not use it."""
    hf = make_tiny_llama(tmp_path / "hf", num_key_value_heads=8, tie_word_embeddings=True)
    write_nemo(HuggingFaceSource(hf), tmp_path / "nemo")
    args = megatron_args(
        group_query_attention=False, num_query_groups=1, untie_embeddings_and_output_weights=False, vocab_size=None
    )
    assert_same(open_source(as_megatron_lm(tmp_path / "nemo", tmp_path / "raw", args)), HuggingFaceSource(hf))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"normalization": "LayerNorm"},
        {"swiglu": False},
        {"position_embedding_type": "yarn"},
        {"num_experts": 8},
        {"qk_layernorm": True},
        {"rotary_percent": 0.5},
        {"add_qkv_bias": True},
        {"apply_layernorm_1p": True},
    ],
)
def test_arguments_of_another_architecture_are_refused(iteration, change):
    torch.save({"args": megatron_args(**change)}, iteration / "common.pt")
    (name, value), *_ = change.items()
    with pytest.raises(UserError, match=f"{name}={value}, which a Llama in the Hugging Face format cannot have"):
        open_source(iteration)


def test_sizes_that_the_weights_do_not_have_are_refused(iteration):
    torch.save({"args": megatron_args(ffn_hidden_size=80)}, iteration / "common.pt")
    with pytest.raises(UserError, match="but its context implies"):
        open_source(iteration)
    args = megatron_args()
    del args.kv_channels, args.swiglu
    torch.save({"args": args}, iteration / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt does not state kv_channels, swiglu; put .* config\.json"):
        open_source(iteration)


def test_without_arguments_a_config_is_needed_and_may_be_given(hf, iteration, tmp_path):
    for content in ({}, [1], {"args": {"num_layers": 4}}):
        torch.save(content, iteration / "common.pt")
        with pytest.raises(UserError, match=r"does not contain the arguments .* config\.json next to it"):
            open_source(iteration)
    (iteration / "common.pt").unlink()
    with pytest.raises(UserError, match=r"no config\.json and no common\.pt"):
        open_source(iteration)
    with pytest.raises(UserError, match="There is no config"):
        open_source(iteration, config=tmp_path / "nothing")
    original = HuggingFaceSource(hf)
    for config in (hf, hf / "config.json"):
        source = open_source(iteration, config=config)
        assert_same(source, original)
        assert [path.name for path in source.assets] == [path.name for path in original.assets]
    shutil.copy(hf / "config.json", iteration)
    assert_same(open_source(iteration), original)
    with pytest.raises(UserError, match="needs no config"):
        open_source(hf, config=hf)


def test_the_folder_of_a_run_means_its_last_checkpoint(hf, iteration):
    tracker = iteration.parent / "latest_checkpointed_iteration.txt"
    tracker.write_text("100\n")
    assert_same(open_source(iteration.parent), HuggingFaceSource(hf))
    iteration.rename(iteration.parent / "release")
    with pytest.raises(UserError, match="names iter_0000100, which does not exist"):
        open_source(iteration.parent)
    tracker.write_text("release")
    assert_same(open_source(iteration.parent), HuggingFaceSource(hf))


def test_the_weights_folder_of_a_nemo_checkpoint_will_do(hf, iteration, tmp_path):
    nemo = tmp_path / "nemo"
    assert type(open_source(nemo / "weights")) is NemoSource
    (nemo / "weights").rename(tmp_path / "bare")
    source = open_source(tmp_path / "bare", config=hf)
    assert type(source) is MegatronSource
    assert_same(source, HuggingFaceSource(hf))
    (tmp_path / "bare").rename(nemo / "weights")
    (nemo / "context" / "huggingface_config.json").unlink()
    (nemo / "context" / "io.json").write_text("{}")
    assert_same(open_source(nemo, config=hf), HuggingFaceSource(hf))


@pytest.mark.parametrize("content", [lambda bomb: {"args": bomb}, lambda bomb: {"args": megatron_args(x=bomb)}])
def test_a_bomb_in_common_pt_does_not_run(hf, iteration, tmp_path, content):
    torch.save(content(Bomb(tmp_path / "ran")), iteration / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt asks for \w+\.system"):
        convert(iteration, tmp_path / "out", to="hf")
    shutil.copy(hf / "config.json", iteration)  # with a config nobody opens common.pt
    convert(iteration, tmp_path / "out", to="hf")
    assert not (tmp_path / "ran").exists()
    torch.load(iteration / "common.pt", weights_only=False)  # the proof that it would have
    assert (tmp_path / "ran").exists()


class _AsGetattr:
    """Pickled as ``getattr(owner, name)``, as Python 3.11.2 pickles the member of an enumeration."""

    def __init__(self, owner, name):
        self.call = getattr, (owner, name)

    def __reduce__(self):
        return self.call


def test_getattr_in_common_pt_yields_members_of_enumerations_only(hf, iteration, tmp_path):
    from megatron.core.transformer.enums import AttnBackend

    torch.save({"args": megatron_args(attention_backend=_AsGetattr(AttnBackend, "flash"))}, iteration / "common.pt")
    convert(iteration, tmp_path / "out", to="hf")
    torch.save({"args": megatron_args(x=_AsGetattr(argparse.Namespace, "__init__"))}, iteration / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt asks for builtins\.getattr"):
        convert(iteration, tmp_path / "again", to="hf")


@pytest.mark.parametrize("name", ["megatron.core.utils\nnvtx_range_push", "numpy.subprocess\nrun"])
def test_a_bomb_under_an_expected_name_finds_nothing_to_call(iteration, name):
    """What stands in for the classes of Megatron and numpy does nothing, whatever the name and the arguments."""
    call = b"\x80\x02c" + name.encode() + b"\nX\x02\x00\x00\x00ls\x85R."
    with zipfile.ZipFile(iteration / "common.pt", "w") as file:
        for entry, content in (("data.pkl", call), ("version", b"3\n"), ("byteorder", b"little")):
            file.writestr(f"common/{entry}", content)
    with pytest.raises(UserError, match="does not contain the arguments"):  # so it was loaded, as something inert
        open_source(iteration)


def test_older_formats_are_refused(hf, iteration, tmp_path):
    nemo = tmp_path / "nemo"
    array = nemo / "weights" / "module.embedding.word_embeddings.weight"
    array.mkdir()
    (array / ".zarray").write_text("{}")
    with pytest.raises(UserError, match=r"zarr checkpoint.*save_ckpt_format='torch_dist'"):
        open_source(nemo)
    shutil.rmtree(array)
    open_source(nemo)
    about = json.loads((nemo / "weights" / "metadata.json").read_text())
    (nemo / "weights" / "metadata.json").write_text(json.dumps({**about, "sharded_backend": "zarr"}))
    with pytest.raises(UserError, match="zarr checkpoint"):
        convert(nemo, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
    (iteration / "mp_rank_00").mkdir()
    with pytest.raises(UserError, match="one file per rank"):
        open_source(iteration)
    with pytest.raises(UserError, match="is a file; give the folder"):
        open_source(hf / "config.json")


def _save_with_megatron(folder):
    """Build a Llama of Megatron-Core with random weights, save it as Megatron-LM does, and return its state dict."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from nemo_pvs.megatron.cpu import megatron_on_cpu

    with megatron_on_cpu():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=8,
            num_query_groups=2,
            kv_channels=16,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            use_cpu_initialization=True,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=150,
            max_sequence_length=256,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        for parameter in model.parameters():
            parameter.data.normal_()
        folder.mkdir(parents=True)
        state = {"model": model.sharded_state_dict(), "args": megatron_args(), "checkpoint_version": 3.0}
        dist_checkpointing.save(state, str(folder))
        return {name: value.numpy() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parallel
def test_what_megatron_core_saves_is_read(tmp_path):
    [state] = run_ranks(1, _save_with_megatron, tmp_path / "iter_0000001")
    source = open_source(tmp_path / "iter_0000001")
    read = source.read
    assert torch.equal(
        read("model.embed_tokens.weight"), torch.from_numpy(state["embedding.word_embeddings.weight"])[:128]
    )
    assert torch.equal(read("lm_head.weight"), torch.from_numpy(state["output_layer.weight"])[:128])
    for layer in range(4):
        ours, theirs = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        gate, up = torch.from_numpy(state[theirs + "mlp.linear_fc1.weight"]).chunk(2)
        assert torch.equal(read(ours + "mlp.gate_proj.weight"), gate)
        assert torch.equal(read(ours + "mlp.up_proj.weight"), up)
        groups = torch.from_numpy(state[theirs + "self_attention.linear_qkv.weight"]).reshape(2, 6, 16, 64)
        assert torch.equal(read(ours + "self_attn.q_proj.weight"), groups[:, :4].reshape(128, 64))
        assert torch.equal(read(ours + "self_attn.k_proj.weight"), groups[:, 4].reshape(32, 64))
        assert torch.equal(read(ours + "self_attn.v_proj.weight"), groups[:, 5].reshape(32, 64))
        for one, other in (
            ("input_layernorm.weight", "input_layernorm.weight"),
            ("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
            ("self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
            ("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
        ):
            assert torch.equal(read(ours + one), torch.from_numpy(state[theirs + other]))
