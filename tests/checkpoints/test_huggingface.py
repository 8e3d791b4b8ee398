from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.manifest import MANIFEST, Manifest
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import sha256_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_reads_what_transformers_wrote(make_tiny_llama, tmp_path, tied, shard):
    make_tiny_llama(tmp_path, tie_word_embeddings=tied, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    source = HuggingFaceSource(tmp_path)
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(source.read(name), value) for name, value in expected.items())
    assert source.extra_tensors == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_loads_what_is_written(make_tiny_llama, tmp_path, dtype):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "in", dtype=dtype))
    write_huggingface(source, tmp_path / "out", max_shard_bytes=50_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 4
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 50_000 for shard in shards)
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / side, dtype="auto", output_loading_info=True)
        for side in ("in", "out")
    )
    assert not any(after[1].values())
    assert after[0].dtype == dtype
    ids = torch.arange(20)[None]
    assert torch.equal(before[0](ids).logits, after[0](ids).logits)


def test_a_tensor_larger_than_a_shard_gets_its_own(make_tiny_llama, tmp_path):
    write_huggingface(HuggingFaceSource(make_tiny_llama(tmp_path / "in")), tmp_path / "out", max_shard_bytes=1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(index["weight_map"]) == 4 * 9 + 3
    tensors = load_file(tmp_path / "in" / "model.safetensors").values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)


def test_the_config_is_kept_and_made_explicit(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path / "in", num_attention_heads=4, head_dim=16)
    edit_json(tmp_path / "in" / "config.json", head_dim=None, eos_token_id=[5, 7])
    write_huggingface(HuggingFaceSource(tmp_path / "in"), tmp_path / "out", dtype=torch.bfloat16)
    before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out"))
    assert after == {**before, "head_dim": 16, "dtype": "bfloat16"}


@pytest.mark.parametrize("keys", [["torch_dtype"], ["dtype"], ["dtype", "torch_dtype"], []])
def test_both_spellings_of_the_dtype_are_corrected(make_tiny_llama, tmp_path, keys):
    make_tiny_llama(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, **dict.fromkeys(keys, "float16")}))
    write_huggingface(HuggingFaceSource(tmp_path / "in"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in written if "dtype" in key} == dict.fromkeys(
        keys or ["torch_dtype"], "float32"
    )


def test_casting_rounds_like_torch(make_tiny_llama, tmp_path):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "in"))
    manifest = write_huggingface(source, tmp_path / "out", dtype=torch.bfloat16)
    written = HuggingFaceSource(tmp_path / "out")
    for name, record in manifest.tensors.items():
        assert record.dtype == "bfloat16"
        assert torch.equal(written.read(name), source.read(name).to(torch.bfloat16))


def test_the_manifest_names_every_tensor_and_file(make_tiny_llama, tmp_path):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "in"))
    manifest = write_huggingface(source, tmp_path / "out")
    assert Manifest.read(tmp_path / "out") == manifest
    assert {*manifest.files, MANIFEST} == {path.name for path in (tmp_path / "out").iterdir()}
    expected = {name: sha256_file(tmp_path / "out" / name) for name in manifest.files}
    expected["model.safetensors"] = None  # its tensors have hashes
    assert {name: record.sha256 for name, record in manifest.files.items()} == expected
    assert manifest.tensors.keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    again = write_huggingface(source, tmp_path / "again")
    assert again == manifest


def test_only_assets_travel(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path / "in")
    kept = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
    kept += ["chat_template.jinja", "generation_config.json"]
    for name in [*kept, "README.md", "optimizer.pt", "tokenizer.bin"]:
        (tmp_path / "in" / name).write_text("{}")
    (tmp_path / "in" / "tokenizer.model").write_bytes(b"GGUF and 98 MB of weights")
    source = HuggingFaceSource(tmp_path / "in")
    assert sorted(path.name for path in source.assets) == sorted(kept)
    write_huggingface(source, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*kept, "config.json", "model.safetensors", MANIFEST}


def test_progress_ends_at_all_parameters(make_tiny_llama, tmp_path):
    seen = []
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "in", tie_word_embeddings=True))
    write_huggingface(source, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    parameters = sum(tensor.numel() for tensor in load_file(tmp_path / "in" / "model.safetensors").values())
    assert seen[-1] == (parameters, parameters)
    assert seen == sorted(seen)


def test_an_existing_target_is_refused(make_tiny_llama, tmp_path):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="already exists"):
        write_huggingface(source, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()
    write_huggingface(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()


def test_a_failure_leaves_nothing(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path / "in", max_shard_size="100KB")
    source = HuggingFaceSource(tmp_path / "in")
    sorted((tmp_path / "in").glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(UserError, match=r"Cannot read .* from .*model-\d+-of-\d+\.safetensors: No such file"):
        write_huggingface(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_without_weights_is_refused(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"none of model\.safetensors, pytorch_model\.bin and their \.index\.json"):
        HuggingFaceSource(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {"a": "../a.safetensors"}}', "{"])
def test_a_broken_index_is_refused(make_tiny_llama, tmp_path, index):
    make_tiny_llama(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json"):
        HuggingFaceSource(tmp_path)


def test_a_missing_tensor_is_refused(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"lacks 1 tensors that its config\.json implies: model\.norm\.weight;"):
        HuggingFaceSource(tmp_path)
    edit_weights(tmp_path, lambda tensors: [tensors.pop(name) for name in sorted(tensors) if "layers.2" in name])
    with pytest.raises(UserError, match=r"lacks 10 tensors .*: (model\.layers\.2\.\S+, ){2}\S+ and 7 more;"):
        HuggingFaceSource(tmp_path)


def test_an_index_that_names_the_wrong_shard_is_refused(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, last = (index["weight_map"][name] for name in ("model.embed_tokens.weight", "model.norm.weight"))
    assert first != last
    index["weight_map"]["model.norm.weight"] = first
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.norm\.weight is not in the file of .* that its index names"):
        HuggingFaceSource(tmp_path)


def test_weights_of_another_config_are_refused(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path)
    edit_json(tmp_path / "config.json", intermediate_size=80)
    with pytest.raises(UserError, match=r"gate_proj\.weight .* is \[96, 64\], but config\.json implies \[80, 64\]"):
        HuggingFaceSource(tmp_path)


def test_biases_are_refused_but_old_buffers_are_not(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path, tie_word_embeddings=True)
    edit_weights(
        tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert len(HuggingFaceSource(tmp_path).extra_tensors) == 2
    edit_weights(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}))
    with pytest.raises(UserError, match=r"1 tensors .*o_proj\.bias"):
        HuggingFaceSource(tmp_path)


def stored_as(folder, tensors, *, of_pytorch):
    (folder / "model.safetensors").unlink()
    if of_pytorch:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("of_pytorch", [False, True])
def test_a_head_of_its_own_unties_the_model(make_tiny_llama, tmp_path, capsys, of_pytorch):
    folder = make_tiny_llama(tmp_path / "in", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()
    stored_as(folder, tensors, of_pytorch=of_pytorch)
    source = HuggingFaceSource(folder)
    assert source.extra_tensors == ()
    write_huggingface(HuggingFaceSource(folder), tmp_path / "out")
    assert capsys.readouterr().out.count("the head is kept and the model untied") == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(written.lm_head.weight, tensors[HEAD])
    assert torch.equal(written.model.embed_tokens.weight, tensors[EMBEDDING])


@pytest.mark.parametrize("of_pytorch", [False, True])
def test_an_equal_copy_of_a_tied_embedding_is_dropped(make_tiny_llama, tmp_path, capsys, of_pytorch):
    folder = make_tiny_llama(tmp_path / "in", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBEDDING][3, 5] = torch.nan  # equal to itself here
    tensors[HEAD] = tensors[EMBEDDING] if of_pytorch else tensors[EMBEDDING].clone()
    stored_as(folder, tensors, of_pytorch=of_pytorch)
    source = HuggingFaceSource(folder)
    assert source.extra_tensors == (HEAD,)
    assert source.config["tie_word_embeddings"] is True
    assert capsys.readouterr().out == ""


def test_heads_are_compared_again_when_the_files_change(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert HuggingFaceSource(tmp_path).config["tie_word_embeddings"] is True
    edit_weights(tmp_path, lambda tensors: tensors[HEAD][-1, -1].add_(1))
    assert HuggingFaceSource(tmp_path).config["tie_word_embeddings"] is False


def test_a_head_of_another_size_is_refused(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: torch.ones(130, 64)}))
    with pytest.raises(UserError, match=r"lm_head\.weight .* is \[130, 64\], but config\.json implies \[128, 64\]"):
        HuggingFaceSource(tmp_path)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantisation_that_plain_weights_do_not_have_is_left_out(make_tiny_llama, tmp_path, capsys, key):
    make_tiny_llama(tmp_path / "in")
    before = json.loads((tmp_path / "in" / "config.json").read_text())
    edit_json(tmp_path / "in" / "config.json", **{key: {"quant_method": "compressed-tensors"}})
    write_huggingface(HuggingFaceSource(tmp_path / "in"), tmp_path / "out")
    assert capsys.readouterr().out.count(f"has {key}, but the weights are plain floating-point numbers") == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def _store_int8(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)


def _store_scales(tensors):
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(96, 1)


@pytest.mark.parametrize("quantize", [_store_int8, _store_scales])
def test_quantised_weights_are_called_by_their_method(make_tiny_llama, tmp_path, quantize):
    make_tiny_llama(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "fp8"})
    edit_weights(tmp_path, quantize)
    with pytest.raises(UserError, match=r"weights quantised by FP8 \(such as model\.layers\.0\.mlp\.up_proj\.weight"):
        HuggingFaceSource(tmp_path)


def test_a_broken_config_is_refused(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is not a model's configuration"):
        HuggingFaceSource(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        HuggingFaceSource(tmp_path)
