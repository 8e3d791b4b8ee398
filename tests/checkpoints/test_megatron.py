from __future__ import annotations

import gc
import io
import json
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.manifest import MANIFEST
from nemo_pvs.checkpoints.megatron.source import MegatronSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.errors import UserError
from tests.families import save_tiny

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}


def load_all(folder):
    """Return every tensor of a checkpoint, read by PyTorch itself."""
    reader = TorchDistReader(folder / "weights")
    state = {name: torch.empty(reader.size(name), dtype=reader.dtype(name)) for name in reader.names}
    dcp.load(state, checkpoint_id=folder / "weights", no_dist=True)
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"tie_word_embeddings": True}),
        (torch.float16, {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 6}),
        (torch.bfloat16, {"num_attention_heads": 4, "num_key_value_heads": 4, "max_shard_size": "60KB"}),
        (torch.float32, {"num_key_value_heads": 1, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}),
        (torch.float32, {"num_hidden_layers": 1, "vocab_size": 131, "rms_norm_eps": 1e-5}),
    ],
    ids=["untied", "tied", "three groups", "many shards", "llama3 rope", "one layer"],
)
def test_there_and_back_is_bit_exact(make_tiny_llama, tmp_path, dtype, settings):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "hf", dtype=dtype, **settings))
    there = write_nemo(source, tmp_path / "nemo", pad_vocab_to_multiple=50)
    back = write_huggingface(NemoSource(tmp_path / "nemo"), tmp_path / "back")
    assert there.tensors == back.tensors
    assert there.source == back.source == fingerprint(source)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_text() == (tmp_path / "hf" / file).read_text()
    final = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in final.items():
        original = source.read(name)
        assert tensor.dtype == original.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), original.view(torch.uint8))
    assert sum(tensor.numel() for tensor in final.values()) == sum(
        tensor.numel() for file in (tmp_path / "hf").glob("*.safetensors") for tensor in load_file(file).values()
    )


def test_names_and_rows_are_those_of_megatron(make_tiny_llama, tmp_path):
    """platform.md 4.1 gives names and sizes, methods.md 21 the rows."""
    heads, groups, dim = 8, 2, 16
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "hf"))
    write_nemo(source, tmp_path / "nemo", pad_vocab_to_multiple=48)
    stored = load_all(tmp_path / "nemo")
    layer = "module.decoder.layers."
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "module.embedding.word_embeddings.weight": (144, 64),
        "module.output_layer.weight": (144, 64),
        "module.decoder.final_layernorm.weight": (64,),
        layer + "self_attention.linear_qkv.layer_norm_weight": (4, 64),
        layer + "self_attention.linear_qkv.weight": (4, (heads + 2 * groups) * dim, 64),
        layer + "self_attention.linear_proj.weight": (4, 64, heads * dim),
        layer + "mlp.linear_fc1.layer_norm_weight": (4, 64),
        layer + "mlp.linear_fc1.weight": (4, 192, 64),
        layer + "mlp.linear_fc2.weight": (4, 64, 96),
    }
    embedding = stored["module.embedding.word_embeddings.weight"]
    assert torch.equal(embedding[:128], source.read("model.embed_tokens.weight"))
    assert not embedding[128:].any()
    for index in range(4):
        prefix = f"model.layers.{index}."
        q, k, v = (source.read(f"{prefix}self_attn.{letter}_proj.weight") for letter in "qkv")
        expected = torch.cat(
            [
                torch.cat([q[j * 64 : (j + 1) * 64], k[j * dim : (j + 1) * dim], v[j * dim : (j + 1) * dim]])
                for j in range(groups)
            ]
        )
        assert torch.equal(stored[layer + "self_attention.linear_qkv.weight"][index], expected)
        gate, up = (source.read(f"{prefix}mlp.{kind}_proj.weight") for kind in ("gate", "up"))
        assert torch.equal(stored[layer + "mlp.linear_fc1.weight"][index], torch.cat([gate, up]))
        for kind, name in (
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
            ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
            ("mlp.linear_fc2.weight", "mlp.down_proj"),
            ("self_attention.linear_proj.weight", "self_attn.o_proj"),
        ):
            assert torch.equal(stored[layer + kind][index], source.read(f"{prefix}{name}.weight"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_extra_states_are_lists_of_none(family, tmp_path):
    """tests/te has the modules of Transformer Engine ask for these names; here they are written by hand."""
    write_nemo(HuggingFaceSource(save_tiny(tmp_path / "hf", family)), tmp_path / "nemo")
    modules = ["self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj"]
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    if family == "qwen3":
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    names = [f"module.decoder.layers.{name}._extra_state/shard_{index}_3" for name in modules for index in range(3)]
    state = {name: io.BytesIO() for name in (*names, "module.decoder.final_layernorm._extra_state/shard_0_1")}
    dcp.load(state, checkpoint_id=tmp_path / "nemo" / "weights", no_dist=True)
    assert all(value == [None] for value in state.values())
    common = torch.load(tmp_path / "nemo" / "weights" / "common.pt", weights_only=True)
    assert common["content_metadata"]["singleton_local_shards"] is False
    assert json.loads((tmp_path / "nemo" / "weights" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


class LiveBytes:
    """A source that knows how many bytes of what it handed out are still referenced."""

    def __init__(self, inner):
        self.inner = inner
        self.config, self.assets = inner.config, inner.assets
        self.now = self.peak = 0

    def read(self, name):
        tensor = self.inner.read(name)
        size = tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor.untyped_storage(), self.forget, size)
        return tensor

    def forget(self, size):
        self.now -= size


@pytest.mark.parametrize("write", [write_nemo, write_huggingface])
def test_writers_never_hold_the_model(make_tiny_llama, tmp_path, write):
    make_tiny_llama(tmp_path / "hf", num_hidden_layers=24)
    source = LiveBytes(HuggingFaceSource(tmp_path / "hf"))
    gc.disable()  # what is let go must be let go by reference counts
    try:
        write(source, tmp_path / "out")
    finally:
        gc.enable()
    peak = source.peak
    hoard = [source.read(name) for name in source.inner._parts]
    model = sum(tensor.nbytes for tensor in hoard)
    assert source.now == model  # the count does see what is held
    assert 0 < peak < model / 24 + 2 * 128 * 64 * 4  # a layer and the vocabulary


def test_a_fused_tensor_is_read_once_for_its_parts_and_parts_may_be_changed(make_tiny_llama, tmp_path):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "hf"))
    write_nemo(source, tmp_path / "nemo")
    nemo = NemoSource(tmp_path / "nemo")
    names = [f"model.layers.2.self_attn.{letter}_proj.weight" for letter in "qkv"]
    first = nemo.read(names[0])
    (tmp_path / "nemo" / "weights" / "__0_0.distcp").rename(tmp_path / "away")
    rest = [nemo.read(name) for name in names[1:]]  # from memory: the file is gone
    (tmp_path / "away").rename(tmp_path / "nemo" / "weights" / "__0_0.distcp")
    assert all(torch.equal(a, source.read(name)) for a, name in zip([first, *rest], names, strict=True))
    for name in source._parts:
        nemo.read(name).zero_()
        assert torch.equal(nemo.read(name), source.read(name))


def test_a_training_checkpoint_is_read_without_its_optimizer(make_tiny_llama, tmp_path):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "hf"))
    write_nemo(source, tmp_path / "nemo")
    state = load_all(tmp_path / "nemo")
    state.update({f"optimizer.state.exp_avg.{name}": torch.zeros_like(value) for name, value in [*state.items()]})
    for file in ("__0_0.distcp", ".metadata"):
        (tmp_path / "nemo" / "weights" / file).unlink()
    dcp.save(state, checkpoint_id=tmp_path / "nemo" / "weights", no_dist=True)
    nemo = NemoSource(tmp_path / "nemo")
    assert len(nemo.extra_tensors) == 9
    assert fingerprint(nemo) == fingerprint(source)


def test_layers_of_different_dtypes_need_a_dtype(make_tiny_llama, tmp_path):
    class Mixed(HuggingFaceSource):
        def read(self, name):
            return super().read(name).to(torch.bfloat16 if "layers.1.mlp.up" in name else torch.float32)

    source = Mixed(make_tiny_llama(tmp_path / "hf"))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is bfloat16.* explicit dtype"):
        write_nemo(source, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()
    manifest = write_nemo(source, tmp_path / "nemo", dtype=torch.float32)
    assert {record.dtype for record in manifest.tensors.values()} == {"float32"}


def test_norms_may_have_another_dtype_than_matrices(make_tiny_llama, tmp_path):
    class Mixed(HuggingFaceSource):
        def read(self, name):
            return super().read(name).to(torch.float32 if "norm" in name else torch.bfloat16)

    source = Mixed(make_tiny_llama(tmp_path / "hf"))
    write_nemo(source, tmp_path / "nemo")
    nemo = NemoSource(tmp_path / "nemo")
    assert nemo.config["dtype"] == "bfloat16"
    assert nemo.dtype("model.norm.weight") == torch.float32
    assert fingerprint(nemo) == fingerprint(source)


def test_a_context_that_does_not_fit_is_refused(make_tiny_llama, tmp_path):
    write_nemo(HuggingFaceSource(make_tiny_llama(tmp_path / "hf")), tmp_path / "nemo")
    config = tmp_path / "nemo" / "context" / "huggingface_config.json"
    for change in ({"num_hidden_layers": 3}, {"intermediate_size": 80}, {"vocab_size": 129}):
        original = config.read_text()
        config.write_text(json.dumps({**json.loads(original), **change}))
        with pytest.raises(UserError, match="but its context implies"):
            NemoSource(tmp_path / "nemo")
        config.write_text(original)


def test_an_impossible_padding_is_refused(make_tiny_llama, tmp_path):
    with pytest.raises(UserError, match="multiple of 0"):
        write_nemo(HuggingFaceSource(make_tiny_llama(tmp_path / "hf")), tmp_path / "nemo", pad_vocab_to_multiple=0)


def test_a_failure_leaves_nothing(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    source = HuggingFaceSource(tmp_path / "hf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="ends inside"):
        write_nemo(source, tmp_path / "nemo")
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_an_unknown_tensor_is_refused(make_tiny_llama, tmp_path):
    write_nemo(HuggingFaceSource(make_tiny_llama(tmp_path / "hf")), tmp_path / "nemo")
    with pytest.raises(UserError, match=r"no tensor model\.layers\.9"):
        NemoSource(tmp_path / "nemo").read("model.layers.9.mlp.up_proj.weight")


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def write_untied_as_tied(make_tiny_llama, folder, change, *, keep):
    """Write a NeMo checkpoint with a head whose context says that it shares the embedding."""
    hf = make_tiny_llama(folder / "hf")
    weights = load_file(hf / "model.safetensors")
    change(weights)
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    write_nemo(HuggingFaceSource(hf), folder / "nemo", pad_vocab_to_multiple=50)
    (folder / "nemo" / MANIFEST).unlink()  # it would not be ours
    kept, stated = (folder / "nemo" / "context" / name for name in ("huggingface_config.json", "io.json"))
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "tie_word_embeddings": True}))
    fields = json.loads(stated.read_text())["objects"]["llama_config_1"]["items"]
    shared = dict(fields)["Attr(name='share_embeddings_and_output_weights')"]
    text = json.dumps(shared)
    stated.write_text(json.dumps(json.loads(stated.read_text())).replace(text, text.replace("false", "true")))
    if not keep:
        kept.unlink()
    return weights


@pytest.mark.parametrize("keep", [True, False])
def test_a_head_of_its_own_unties_the_model(make_tiny_llama, tmp_path, capsys, keep):
    weights = write_untied_as_tied(make_tiny_llama, tmp_path, lambda weights: None, keep=keep)
    for source in (NemoSource(tmp_path / "nemo"), NemoSource(tmp_path / "nemo")):
        assert source.config["tie_word_embeddings"] is False
        assert torch.equal(source.read(HEAD)[:128], weights[HEAD])  # NeMo's own context counts padding rows
    assert capsys.readouterr().out.count("the head is kept and the model untied") == 1


@pytest.mark.parametrize("keep", [True, False])
def test_an_equal_copy_of_a_tied_embedding_is_dropped(make_tiny_llama, tmp_path, capsys, keep):
    def copy(weights):
        weights[HEAD] = weights[EMBEDDING].clone()

    write_untied_as_tied(make_tiny_llama, tmp_path, copy, keep=keep)
    source = NemoSource(tmp_path / "nemo")
    assert source.config["tie_word_embeddings"] is True
    assert "module.output_layer.weight" in source.extra_tensors
    write_huggingface(source, tmp_path / "back")
    assert HEAD not in load_file(tmp_path / "back" / "model.safetensors")
    assert capsys.readouterr().out == ""


def test_a_head_of_a_bare_folder_is_kept_too(make_tiny_llama, tmp_path):
    weights = write_untied_as_tied(make_tiny_llama, tmp_path, lambda weights: None, keep=True)
    config = tmp_path / "nemo" / "context" / "huggingface_config.json"
    source = MegatronSource(tmp_path / "nemo" / "weights", config)
    assert torch.equal(source.read(HEAD), weights[HEAD])
