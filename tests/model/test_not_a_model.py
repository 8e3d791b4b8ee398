"""Folders and files that look like a model and are none: each is called what it is."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.gguf.file import GgufFile
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.errors import UserError
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"


@pytest.fixture
def hf(tmp_path):
    return save_tiny_tokenizer(make_tiny_llama(tmp_path / "hf"))


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("snapshots", [0, 1, 2])
def test_a_folder_of_the_hub_cache_gets_the_path_of_its_snapshot(hf, tmp_path, snapshots):
    cache = tmp_path / "models--some--model"
    (cache / "snapshots").mkdir(parents=True)
    places = [cache / "snapshots" / (str(number) * 40) for number in range(snapshots)]
    for place in places:
        shutil.copytree(hf, place)
    said = {
        0: "without a snapshot",
        1: f"give the snapshot in it: {cache}/snapshots/{'0' * 40}.",
        2: f"give the snapshot in it: one of {cache}/snapshots/{'0' * 40}, {cache}/snapshots/{'1' * 40}.",
    }
    for read in (open_source, load_tokenizer):
        with pytest.raises(UserError, match=said[snapshots]):
            read(cache)
    for place in places:
        assert open_source(place).config["vocab_size"] == 128


def test_a_lora_adapter_is_called_one(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path / "base"))
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match=f"lora is a LoRA adapter, not a model; merge it into .* {tmp_path}/base with"):
        open_source(tmp_path / "lora")


def test_a_merged_model_beside_its_adapters_config_is_a_model(hf):
    (hf / "adapter_config.json").write_text("{}")
    assert open_source(hf).config["vocab_size"] == 128


@pytest.mark.parametrize(
    ("method", "tensor", "said"),
    [
        ("bitsandbytes", "self_attn.q_proj.weight.absmax", "quantised by bitsandbytes .* call dequantize"),
        ("bitsandbytes", "self_attn.q_proj.SCB", "quantised by bitsandbytes"),
        ("gptq", "self_attn.q_proj.qweight", "quantised by GPTQ .*; give the original, unquantised model.$"),
        ("awq", "self_attn.q_proj.qzeros", "quantised by AWQ"),
        (None, "self_attn.q_proj.qweight", "quantised by GPTQ or AWQ"),
        ("fp8", "self_attn.q_proj.weight_scale_inv", "quantised by FP8"),
        ("compressed-tensors", "self_attn.q_proj.weight_packed", "quantised by compressed-tensors"),
    ],
)
def test_quantised_weights_are_called_so(hf, method, tensor, said):
    tensors = load_file(hf / "model.safetensors")
    packed = torch.zeros(8, 8)
    save_file({**tensors, f"model.layers.0.{tensor}": packed}, hf / "model.safetensors")
    if method:
        change_config(hf, quantization_config={"quant_method": method})
    with pytest.raises(UserError, match=said):
        open_source(hf)


def test_a_folder_of_gguf_files_gets_the_path_of_one(tmp_path):
    (tmp_path / "x-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"contains GGUF files; give one of them, for example {tmp_path}/x-Q4.gguf"):
        open_source(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_in_place_of_a_file_is_called_one(hf, file):
    (hf / file).write_text(POINTER)
    for read in (open_source, load_tokenizer):
        with pytest.raises(UserError, match=f"hf/{file} is a Git LFS pointer, not the file itself; run git lfs pull"):
            read(hf)


@pytest.mark.parametrize("file", ["weights/__0_0.distcp", "context/tokenizer/tokenizer.json"])
def test_a_git_lfs_pointer_in_a_nemo_checkpoint(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(UserError, match=f"{file} is a Git LFS pointer"):
        open_source(tmp_path)


def test_a_git_lfs_pointer_in_place_of_a_gguf_file(tmp_path):
    (tmp_path / "x.gguf").write_text(POINTER)
    for read in (GgufFile, lambda path: prepare_parent(str(path), tmp_path / "made")):
        with pytest.raises(UserError, match=r"x\.gguf is a Git LFS pointer"):
            read(tmp_path / "x.gguf")
