from __future__ import annotations

import hashlib
import json
import math
from collections import Counter

import pytest
import torch
import xxhash

from nemo_pvs.checkpoints.convert import convert, describe_checkpoint, verify_checkpoint
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.manifest import MANIFEST, Manifest, is_finite
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import UserError
from tests.state_source import StateSource, tiny_model

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 500, 4098, -1])
def test_one_bad_value_is_found_wherever_it_is(dtype, value, position):
    tensor = torch.randn(4099, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0], tensor[1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert is_finite(tensor)
    tensor[position] = value
    assert not is_finite(tensor)


def set_weight(model, name, value):
    with torch.no_grad():
        model.state_dict()[name][1, 2] = value
    return model


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "nemo"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_broken_weight_is_refused_by_name(tmp_path, to, value):
    name = "model.layers.2.mlp.up_proj.weight"
    set_weight(tiny_model(), name, value).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=rf"^{name} has NaN or infinite values, .*--allow-nonfinite"):
        convert(tmp_path / "hf", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "hf", tmp_path / "out", to=to, allow_nonfinite=True)
    convert(tmp_path / "out", tmp_path / "back", to="hf", allow_nonfinite=True)
    written = HuggingFaceSource(tmp_path / "back").read(name)
    assert written.isfinite().sum() == written.numel() - 1
    assert torch.equal(written[1, 2], torch.tensor(value)) or written[1, 2].isnan()


def test_a_weight_too_large_for_the_dtype_is_refused(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    set_weight(tiny_model(), name, 70000.0).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "bfloat16", to="nemo", dtype=torch.bfloat16)
    with pytest.raises(UserError, match=rf"^{name} has NaN or infinite values as float16, .*another dtype"):
        convert(tmp_path / "hf", tmp_path / "float16", to="nemo", dtype=torch.float16)


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_tensors_are_named_by_xxh3(make_tiny_llama, tmp_path, to):
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "hf"))
    manifest = convert(tmp_path / "hf", tmp_path / "out", to=to)
    written = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert written["hash"] == manifest.hash == "xxh3_128"
    for name, record in written["tensors"].items():
        tensor = source.read(name)
        assert record["digest"] == xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest()
        assert (record["dtype"], record["size"]) == ("float32", list(tensor.shape))


def as_first_written(folder):
    """Give a checkpoint the manifest that the first version wrote: SHA-256 of everything, and no word of it."""
    source = HuggingFaceSource(folder)
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    del values["hash"]
    for name, record in values["tensors"].items():
        del record["digest"]
        record["sha256"] = hashlib.sha256(source.read(name).numpy().tobytes()).hexdigest()
    for name, record in values["files"].items():
        record["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(values))
    return values


def test_the_first_manifests_still_verify(make_tiny_llama, tmp_path):
    convert(make_tiny_llama(tmp_path / "hf"), tmp_path / "out", to="hf")
    values = as_first_written(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").hash == "sha256"
    assert describe_checkpoint(tmp_path / "out")["manifest"] == "complete"
    values["tensors"]["model.norm.weight"]["sha256"] = "0" * 64
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"model\.norm\.weight in .*out does not match pvs_manifest.json there"):
        verify_checkpoint(tmp_path / "out")


def test_hashes_of_the_future_are_refused(make_tiny_llama, tmp_path):
    manifest = convert(make_tiny_llama(tmp_path / "hf"), tmp_path / "out", to="hf")
    path = tmp_path / "out" / MANIFEST
    path.write_text(path.read_text().replace(manifest.hash, "sha4"))
    with pytest.raises(UserError, match=r"sha4 hashes, which this version does not know \(xxh3_128, sha256\)"):
        Manifest.read(tmp_path / "out")


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_a_changed_file_is_found(make_tiny_llama, tmp_path, to):
    make_tiny_llama(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text('{"version": 1}')
    convert(tmp_path / "hf", tmp_path / "out", to=to)
    [tokenizer] = (tmp_path / "out").rglob("tokenizer.json")
    tokenizer.write_text('{"version": 2}')
    with pytest.raises(UserError, match=r"tokenizer\.json in .*out does not match pvs_manifest.json there"):
        verify_checkpoint(tmp_path / "out")
    tokenizer.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json in .*out does not match pvs_manifest.json there"):
        verify_checkpoint(tmp_path / "out")


def test_shards_are_as_large_as_asked(make_tiny_llama, tmp_path):
    convert(make_tiny_llama(tmp_path / "hf"), tmp_path / "nemo", to="nemo")
    convert(tmp_path / "nemo", tmp_path / "out", to="hf", max_shard_bytes=60_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("model-*.safetensors")]
    total = 4 * describe_checkpoint(tmp_path / "hf")["parameters"]
    assert len(sizes) >= total / 60_000 > 10
    assert max(sizes) < 60_000 + 20_000  # with the header


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tensor_is_read_once_its_fingerprint_included(tmp_path, dtype):
    source = StateSource(tiny_model(num_hidden_layers=5))
    manifest = write_nemo(source, tmp_path / "nemo", dtype=dtype)
    assert Counter(source.reads) == dict.fromkeys(manifest.tensors, 1)
    assert manifest.source == fingerprint(source)  # of what was read, not of what it was cast to
    assert (manifest.source == fingerprint(open_source(tmp_path / "nemo"))) == (dtype is None)
