"""Every place a model may come from gives the same weights, and none of them can run code."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import types
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.fetch import SMOLLM2, local_checkpoint
from nemo_pvs.checkpoints.files import pytorch_bin
from nemo_pvs.checkpoints.files.pytorch_bin import PytorchBinReader
from nemo_pvs.checkpoints.files.torch_dist import Block, TorchDistReader, write_torch_dist
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.megatron.source import MegatronSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import UserError
from tests.conftest import save_tiny_tokenizer
from tests.forked_commands import ForkedCommands, forked_commands
from tests.megatron.ranks import run_ranks

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Bomb:
    def __init__(self, path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


def assert_same(source, expected):
    assert source._parts.keys() == expected._parts.keys()
    for name in expected._parts:
        got, wanted = source.read(name), expected.read(name)
        assert got.dtype == wanted.dtype, name
        assert torch.equal(got, wanted), name


# --- pytorch_model.bin


@pytest.fixture(params=["1GB", "60KB"], ids=["one file", "many files"])
def bin_folder(request, make_tiny_llama, tmp_path):
    """A bf16 Llama as transformers saves it when told to write PyTorch files; the safetensors twin is in ``hf``."""
    make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bin", safe_serialization=False, max_shard_size=request.param)
    assert (len([*(tmp_path / "bin").glob("pytorch_model*.bin")]) > 3) == (request.param == "60KB")
    assert not [*(tmp_path / "bin").glob("*.safetensors")]
    return tmp_path / "bin"


def test_pytorch_files_are_read_like_safetensors(bin_folder, tmp_path):
    source, twin = HuggingFaceSource(bin_folder), HuggingFaceSource(tmp_path / "hf")
    assert_same(source, twin)
    assert fingerprint(source) == fingerprint(twin)
    there = convert(bin_folder, tmp_path / "nemo", to="nemo")
    assert there.tensors == convert(tmp_path / "hf", tmp_path / "twin", to="nemo").tensors


@pytest.mark.slow
def test_what_is_read_is_a_copy_whether_or_not_the_file_is_mapped_anew(bin_folder, tmp_path, monkeypatch):
    for limit in (0, 1 << 40):
        monkeypatch.setattr(pytorch_bin, "_MAPPED_BYTES", limit)
        source = HuggingFaceSource(bin_folder)
        for name in source._parts:
            source.read(name).zero_()
        assert_same(source, HuggingFaceSource(tmp_path / "hf"))


def test_safetensors_come_first(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path, seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    assert HuggingFaceSource(tmp_path).read("model.norm.weight").all()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight.all()  # transformers agrees
    (tmp_path / "model.safetensors").unlink()
    assert not HuggingFaceSource(tmp_path).read("model.norm.weight").any()


def test_views_and_shared_bytes_are_read_as_what_they_show(tmp_path):
    base = torch.arange(24.0)
    tensors = {"whole": base, "row": base[5:8], "transposed": base.reshape(4, 6).T, "repeated": base[:1].expand(3, 2)}
    torch.save({**tensors, "parameter": torch.nn.Parameter(base[2:4])}, tmp_path / "x.bin")
    reader = PytorchBinReader(tmp_path / "x.bin")
    for name, tensor in tensors.items():
        copy = reader.read(name)
        assert copy.is_contiguous()
        assert reader.size(name) == tuple(tensor.shape)
        assert torch.equal(copy, tensor)
    assert type(reader.read("parameter")) is torch.Tensor
    assert not reader.read("parameter").requires_grad


@pytest.mark.parametrize("where", ["value", "key", "extra"])
def test_a_bomb_in_a_pytorch_file_does_not_run(make_tiny_llama, tmp_path, where):
    make_tiny_llama(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    bomb = Bomb(tmp_path / "ran")
    (tmp_path / "hf" / "model.safetensors").unlink()
    content = {"value": {**tensors, "x": bomb}, "key": {(bomb,): 1}, "extra": bomb}[where]
    torch.save(content, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"asks for \w+\.system, which weights never need.* nothing of it was loaded"):
        convert(tmp_path / "hf", tmp_path / "out", to="nemo")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "hf" / "pytorch_model.bin", weights_only=False)  # the proof that it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "not a dictionary of tensors"),
        ({"a": torch.ones(2), "model": {"b": torch.ones(2)}}, "model in .* is not a tensor"),
        ({"a": Fraction(1, 2)}, "asks for fractions.Fraction"),
        ({"a": b"tensor"}, "a in .* is not a tensor"),
    ],
)
def test_a_pytorch_file_of_other_things_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(UserError, match=message):
        PytorchBinReader(tmp_path / "x.bin")


def test_a_broken_or_old_pytorch_file_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    with pytest.raises(UserError, match="missing"):
        PytorchBinReader(path)
    torch.save({"a": torch.ones(500)}, path)
    content = path.read_bytes()
    for keep in (4, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(UserError, match=r"x\.bin is not a complete PyTorch file"):
            PytorchBinReader(path)
    for other in (b"", b"hello", b"\x80\x02."):
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"x\.bin is not a file of PyTorch 1\.6 or later"):
            PytorchBinReader(path)
    torch.save({"a": torch.ones(500)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"x\.bin is not a file of PyTorch 1\.6 or later"):
        PytorchBinReader(path)


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.int8), torch.ones(2, 2).to_sparse()])
def test_quantised_and_sparse_pytorch_tensors_are_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="only dense floating-point weights"):
        PytorchBinReader(tmp_path / "x.bin").read("a")


# --- Megatron-LM


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
            Block(
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
def hf(make_tiny_llama, tmp_path):
    return save_tiny_tokenizer(make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16))


@pytest.fixture
def iteration(hf, tmp_path):
    write_nemo(HuggingFaceSource(hf), tmp_path / "nemo", pad_vocab_to_multiple=50)
    return as_megatron_lm(tmp_path / "nemo", tmp_path / "run" / "iter_0000100", megatron_args())


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Iterator[ForkedCommands]:
    """Run Python where only what reads checkpoints is imported, not the hub's library, which reads the environment."""
    modules = [f"nemo_pvs.checkpoints.{name}" for name in ("open", "fingerprint", "fetch")]
    with forked_commands(tmp_path_factory.mktemp("commands") / "outputs", *modules) as run:
        yield run


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


# --- what is made into a folder first


def test_a_folder_is_its_own_local_checkpoint(hf):
    with local_checkpoint(str(hf)) as folder:
        assert folder == hf
    assert HuggingFaceSource(hf)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder_for_as_long_as_it_is_needed(tmp_path):
    leftover = tmp_path / ".out.source-0" / "huggingface"
    leftover.mkdir(parents=True)
    with local_checkpoint(SMOLLM2, beside=tmp_path / "out") as folder:
        assert folder == leftover
        manifest = convert(folder, tmp_path / "out", to="nemo")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert manifest.tensors["model.embed_tokens.weight"].size == (49152, 576)


def test_a_broken_gguf_file_leaves_nothing(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(UserError, match=r"x\.gguf is not a readable GGUF file"),
        local_checkpoint(str(tmp_path / "x.gguf"), beside=tmp_path / "out"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


HUB = """
import http.server, json, pathlib, sys
root = pathlib.Path(sys.argv[1])
asked = []

class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/some/model"):
            names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
            about = {"id": "some/model", "sha": "1" * 40, "siblings": [{"rfilename": name} for name in names]}
            tree = [{"type": "file", "path": n, "size": (root / n).stat().st_size, "oid": "1" * 40} for n in names]
            self.answer(json.dumps(tree if "/tree/" in path else about).encode())
        elif path == "/asked":
            self.answer(json.dumps(asked).encode())
        elif "/resolve/" in path and (root / path.split("1" * 40 + "/")[-1]).is_file():
            asked.append(path.split("1" * 40 + "/")[-1])
            self.answer((root / asked[-1]).read_bytes())
        else:
            self.send_response(404)
            self.end_headers()

    do_HEAD = do_GET

    def answer(self, content):
        self.send_response(200)
        for name, value in {"Content-Length": len(content), "ETag": f'"{len(content)}"',
                            "X-Repo-Commit": "1" * 40}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def hub(hf):
    """A server on this machine that answers as the Hugging Face hub does, with one model."""
    server = subprocess.Popen([sys.executable, "-c", HUB, str(hf)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    server.kill()
    server.wait()
    server.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("safetensors", [True, False])
def test_a_hub_id_is_downloaded_without_what_is_not_needed(python, hub, hf, tmp_path, safetensors):
    wanted = {path.name for path in hf.iterdir()} - {"README.md"}
    if safetensors:
        (hf / "pytorch_model.bin").write_bytes(b"the same again")
    else:
        torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
        (hf / "model.safetensors").unlink()
        wanted = {*wanted, "pytorch_model.bin"} - {"model.safetensors"}
    (hf / "original").mkdir()
    for extra in ("original/consolidated.00.pth", "original/tokenizer.model", "consolidated.safetensors", "run.py"):
        (hf / extra).write_bytes(b"not needed")
    script = (
        "from pathlib import Path; from nemo_pvs.checkpoints.fetch import local_checkpoint, prepare_parent;"
        "from nemo_pvs.checkpoints.open import open_source; from nemo_pvs.checkpoints.fingerprint import fingerprint\n"
        "with local_checkpoint('hf://some/model') as folder: print(fingerprint(open_source(folder)))\n"
        f"made = prepare_parent('hf://some/model@main', Path({str(tmp_path / 'made')!r}))\n"
        "print(fingerprint(open_source(made)))"
    )
    done = python("-c", script, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "cache"), HF_HUB_DISABLE_XET="1")
    assert done.code == 0, done.errors[-2000:]
    assert done.output.split() == [fingerprint(HuggingFaceSource(hf))] * 2
    assert {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*")} == wanted
    with urllib.request.urlopen(f"{hub}/asked") as answer:
        assert {*json.load(answer)} == wanted


@pytest.fixture
def ask_the_hub(python, tmp_path) -> Callable[..., str]:
    """Run a script with a cache of its own and return what it prints; of UserErrors it is one line each."""
    start = (
        "from pathlib import Path; from nemo_pvs.checkpoints.fetch import local_checkpoint, prepare_parent\n"
        "from nemo_pvs.checkpoints.open import open_source; from nemo_pvs.checkpoints.fingerprint import fingerprint\n"
        "from nemo_pvs.errors import UserError\n"
        "def attempt(model):\n"
        "    try: local_checkpoint(model).__enter__()\n"
        "    except UserError as error: print(error)\n"
    )
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}

    def ask(script: str, **environment: str) -> str:
        done = python("-c", start + script, **cache, **environment)
        assert done.code == 0, done.errors[-2000:]
        return done.output

    return ask


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_sentence(ask_the_hub):
    said = ask_the_hub("attempt('hf://some/model')", HF_ENDPOINT="http://127.0.0.1:9")
    assert said == (
        "Cannot download some/model from the Hugging Face hub: it cannot be reached; check the network, or set "
        "HF_HUB_OFFLINE=1 to use what is in the cache.\n"
    )


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_sentence(ask_the_hub, hub, hf):
    said = ask_the_hub("attempt('hf://no/model'); attempt('hf://not a name')", HF_ENDPOINT=hub)
    lines = said.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Cannot download no/model from the Hugging Face hub: ")
    assert lines[1].endswith("that is not a valid repository name; write hf://owner/name.")
    (hf / "adapter_config.json").write_text("{}")
    (hf / "config.json").unlink()
    said = ask_the_hub("attempt('hf://some/model')", HF_ENDPOINT=hub)
    assert said.startswith("hf://some/model is a LoRA adapter, not a model; merge it into its base model with")


@pytest.mark.slow
def test_offline_the_cache_is_used_if_the_model_is_there(ask_the_hub, hub, hf, tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    said = ask_the_hub("attempt('hf://some/model')", **nowhere)
    assert said == (
        "HF_HUB_OFFLINE is set, and some/model is not in the Hugging Face cache; unset it to download the model.\n"
    )
    script = (
        "with local_checkpoint('hf://some/model') as folder: print(fingerprint(open_source(folder)))\n"
        f"made = prepare_parent('hf://some/model', Path({str(tmp_path)!r}) / 'made')\n"
        "print(fingerprint(open_source(made)))"
    )
    ask_the_hub("attempt('hf://some/model')", HF_ENDPOINT=hub)
    said = ask_the_hub(script, **nowhere)
    assert said.split() == [fingerprint(HuggingFaceSource(hf))] * 2
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert made == {path.name for path in hf.iterdir()} - {"README.md"}
    assert not any(path.is_symlink() for path in (tmp_path / "made").iterdir())


# --- what travels with the weights


def test_tokenizer_templates_and_generation_config_come_along_both_ways(hf, tmp_path):
    (hf / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (hf / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (hf / "additional_chat_templates" / f"{name}.jinja").write_text(name + "{{ messages[0]['content'] }}")
    (hf / "chat_template.json").write_text('{"chat_template": "x"}')
    (hf / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [3, 4]}')
    convert(hf, tmp_path / "nemo", to="nemo")
    convert(tmp_path / "nemo", tmp_path / "back", to="hf")
    for folder in (tmp_path / "nemo" / "context" / "tokenizer", tmp_path / "back"):
        assert (folder / "additional_chat_templates" / "rag.jinja").read_text() == "rag{{ messages[0]['content'] }}"
    files = {str(path.relative_to(hf)) for path in hf.rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*") if path.is_file()} == {
        *files,
        "pvs_manifest.json",
    }
    for file in files - {"model.safetensors", "config.json"}:
        assert (tmp_path / "back" / file).read_bytes() == (hf / file).read_bytes(), file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.apply_chat_template([{"content": "w5"}], chat_template="rag", tokenize=False) == "ragw5"


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_a_tokenizer_that_transformers_5_saved_is_given_the_name_that_both_know(hf, tmp_path, to):
    path = hf / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "TokenizersBackend"}))
    convert(hf, tmp_path / "out", to=to)
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="TokenizersBackend"):
        AutoTokenizer.from_pretrained(hf)
    folder = tmp_path / "out" if to == "hf" else tmp_path / "out" / "context" / "tokenizer"
    assert AutoTokenizer.from_pretrained(folder)("w5 w7")["input_ids"] == [5, 7]
