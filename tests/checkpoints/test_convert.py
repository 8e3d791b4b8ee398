from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.convert import convert, describe_checkpoint, verify_checkpoint
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.manifest import MANIFEST
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape

PARAMETERS = 172_608  # of the tiny Llama: 2 * 128 * 64 + 4 * (2 * 64 * 16 * 10 + 3 * 64 * 96 + 2 * 64) + 64


def flip_a_bit(path, position=-200):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_there_and_back_gives_the_same_logits(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16)
    there = convert(tmp_path / "hf", tmp_path / "nemo", to="nemo")
    back = convert(tmp_path / "nemo", tmp_path / "back", to="hf")
    assert there.tensors == back.tensors
    ids = torch.arange(30)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / side, dtype="auto")(ids).logits for side in ("hf", "back")
    )
    assert torch.equal(before, after)


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_casting_once_is_casting_for_good(make_tiny_llama, tmp_path, to):
    make_tiny_llama(tmp_path / "hf")
    first = convert(tmp_path / "hf", tmp_path / "a", to=to, dtype=torch.bfloat16)
    second = convert(tmp_path / "a", tmp_path / "b", to=to)
    assert first.tensors == second.tensors
    assert {record.dtype for record in second.tensors.values()} == {"bfloat16"}
    assert first.source == fingerprint(open_source(tmp_path / "hf"))
    assert second.source == fingerprint(open_source(tmp_path / "a")) != first.source
    assert (open_source(tmp_path / "b").config["dtype"]) == "bfloat16"


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_a_changed_weight_is_found(make_tiny_llama, tmp_path, to):
    convert(make_tiny_llama(tmp_path / "hf"), tmp_path / "out", to=to)
    verify_checkpoint(tmp_path / "out")
    data = next(path for path in (tmp_path / "out").rglob("*") if path.suffix in {".safetensors", ".distcp"})
    flip_a_bit(data, data.stat().st_size // 2)
    assert describe_checkpoint(tmp_path / "out")["manifest"] == "complete"  # a look at lengths cannot tell
    with pytest.raises(UserError, match=r"weight in .*out does not match pvs_manifest.json there|Cannot read module"):
        verify_checkpoint(tmp_path / "out")


def test_a_target_that_reads_back_differently_is_not_kept(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path / "hf")
    seen = []
    before = convert(tmp_path / "hf", tmp_path / "out", to="nemo")

    def spoil(done, total):
        if seen and done < seen[-1]:  # the second pass, which reads back, has begun
            flip_a_bit(tmp_path / ".out.partial" / "model.safetensors")
        seen.append(done)

    message = r"out was not kept, since it does not read back as written: \S+ in .*/out does not match pvs_manifest"
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "hf", tmp_path / "out", to="hf", overwrite=True, progress=spoil)
    assert verify_checkpoint(tmp_path / "out") == before  # what was to be replaced is still there
    seen.clear()
    with ignoring_manifests(), pytest.raises(UserError, match=message):  # which are those of the source
        convert(tmp_path / "hf", tmp_path / "out", to="hf", overwrite=True, progress=spoil)
    seen.clear()
    convert(tmp_path / "hf", tmp_path / "out", to="hf", overwrite=True, verify="none", progress=spoil)
    assert seen[-1] == PARAMETERS


def test_missing_and_surplus_tensors_are_found(make_tiny_llama, tmp_path):
    convert(make_tiny_llama(tmp_path / "hf"), tmp_path / "out", to="hf")
    path = tmp_path / "out" / MANIFEST
    manifest = json.loads(path.read_text())
    record = manifest["tensors"].pop("model.norm.weight")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"exactly the tensors of its config \(see model\.norm\.weight\)"):
        verify_checkpoint(tmp_path / "out")
    manifest["tensors"].update({"model.norm.weight": record, "model.more.weight": record})
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"see model\.more\.weight"):
        verify_checkpoint(tmp_path / "out")
    path.write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        verify_checkpoint(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="no manifest"):
        verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("target", [".", "hf"])
def test_the_source_is_never_overwritten(make_tiny_llama, tmp_path, target):
    make_tiny_llama(tmp_path / "all" / "hf")
    with pytest.raises(UserError, match="is or contains the checkpoint to convert"):
        convert(tmp_path / "all" / "hf", tmp_path / "all" / target, to="nemo", overwrite=True)
    assert (tmp_path / "all" / "hf" / "model.safetensors").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out", to="hf")
    with pytest.raises(UserError, match="not a Hugging Face model"):
        convert(tmp_path, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_description(make_tiny_llama, tmp_path, to):
    make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "out", to=to, pad_vocab_to_multiple=99)
    shape = Shape(layers=4, hidden=64, ffn=96, heads=8, kv_groups=2, head_dim=16, vocab=128, tied=False)
    description = describe_checkpoint(tmp_path / "out", tensors=True)
    table = description.pop("tensors")
    assert description == {
        "format": {"hf": "huggingface", "nemo": "nemo"}[to],
        "family": "llama",
        "shape": shape.to_dict(),
        "parameters": PARAMETERS,
        "body_parameters": PARAMETERS - 2 * 128 * 64,
        "flops_per_token": 6 * (PARAMETERS - 128 * 64 - 9 * 64),
        "dtypes": {"bfloat16": PARAMETERS},
        "bytes": 2 * PARAMETERS,
        "masks": 0,
        "extra_tensors": 0,
        "assets": ["generation_config.json", "tokenizer.json"],
        "manifest": "complete",
    }
    assert len(table) == 4 * 9 + 3
    assert table[0] == {
        "name": "model.embed_tokens.weight",
        "dtype": "bfloat16",
        "size": [128, 64],
        "megatron": "embedding.word_embeddings.weight",
        "layer": None,
    }


def test_description_of_what_others_wrote_or_broke(make_tiny_llama, tmp_path):
    make_tiny_llama(tmp_path / "hf")
    assert describe_checkpoint(tmp_path / "hf")["manifest"] == "absent"
    convert(tmp_path / "hf", tmp_path / "out", to="nemo")
    (tmp_path / "out" / "context" / "io.json").unlink()
    (tmp_path / "out" / "context" / "io.json").write_text("{}")
    assert describe_checkpoint(tmp_path / "out")["manifest"] == "broken"
