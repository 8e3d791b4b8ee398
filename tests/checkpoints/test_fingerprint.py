"""A fingerprint covers all that decides what a model computes, and what is taken from manifest or cache is right."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.manifest import MANIFEST
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests

WEIGHTS = "model.safetensors"


def name_of(folder):
    return fingerprint(open_source(folder))


def set_config(folder, **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "(left out)"}))


def change_a_weight(folder, name):
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[-1] *= -2
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def age(folder, seconds=60):
    """Make every file older, as it is when somebody comes to use a model."""
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


@pytest.fixture
def model(make_tiny_llama, tmp_path):
    return make_tiny_llama(tmp_path / "hf")


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 500.0},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
        {"rms_norm_eps": 0.5},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_every_constant_of_the_function_counts(model, change):
    before = name_of(model)
    set_config(model, **change)
    assert name_of(model) != before


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"initializer_range": 0.5},
        {"use_cache": False},
        {"rope_theta": 10000},  # the same as 10000.0
        {"rope_theta": "(left out)"},  # the default is the same
        {"rope_scaling": {"rope_type": "default"}},
        {"max_position_embeddings": 128},
    ],
    ids=str,
)
def test_what_computes_the_same_is_the_same(model, change):
    before = name_of(model)
    set_config(model, **change)
    assert name_of(model) == before


def test_scaled_rotations_count_by_what_they_are(model):
    scaling = {**LLAMA3, "original_max_position_embeddings": 64}
    set_config(model, rope_scaling=scaling)
    before = name_of(model)
    set_config(model, rope_scaling={**scaling, "factor": 8.0, "type": "llama3"})  # as older files state it
    assert name_of(model) == before
    set_config(model, rope_scaling={**scaling, "factor": 16})
    assert name_of(model) != before


@pytest.mark.slow
def test_every_tensor_counts(make_tiny_llama, tmp_path):
    folder = make_tiny_llama(tmp_path / "hf", num_hidden_layers=6)
    names = {name_of(folder)}
    tensors = list(load_file(folder / WEIGHTS))
    for name in tensors:
        change_a_weight(folder, name)
        names.add(name_of(folder))
    assert len(names) == len(tensors) + 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_formats_have_the_same_fingerprint(make_tiny_llama, tmp_path, dtype):
    make_tiny_llama(tmp_path / "hf", dtype=dtype, rope_scaling={**LLAMA3, "original_max_position_embeddings": 64})
    convert(tmp_path / "hf", tmp_path / "nemo", to="nemo")
    convert(tmp_path / "nemo", tmp_path / "back", to="hf")
    assert len({name_of(tmp_path / place) for place in ("hf", "nemo", "back")}) == 1
    # Also where nobody has left a Hugging Face config, or a manifest.
    (tmp_path / "nemo" / "context" / "huggingface_config.json").unlink()
    (tmp_path / "nemo" / MANIFEST).unlink()
    assert name_of(tmp_path / "nemo") == name_of(tmp_path / "hf")


def overwrite_in_place(path, *, keep_time):
    """Flip a bit of the last tensor; with its old time of change no look at the file can tell."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_checksums_are_computed_once_for_files_that_do_not_change(model):
    age(model)
    before = name_of(model)
    overwrite_in_place(model / WEIGHTS, keep_time=True)
    assert name_of(model) == before  # so nothing was read
    os.utime(model / WEIGHTS)
    assert name_of(model) != before


def test_a_file_that_was_just_written_is_not_trusted_to_stay(model):
    before = name_of(model)
    overwrite_in_place(model / WEIGHTS, keep_time=True)  # within a tick of the file system's clock, say
    assert name_of(model) != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"hash": "xxh3_128"}', '{"hash": "xxh3_128", "files": 1}'])
def test_a_broken_cache_is_no_cache(model, monkeypatch, tmp_path, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    age(model)
    before = name_of(model)
    [cached] = (tmp_path / "cache" / "nemo_pvs" / "checksums").iterdir()
    cached.write_text(content)
    assert name_of(model) == before
    overwrite_in_place(model / WEIGHTS, keep_time=True)
    assert name_of(model) == before  # the cache is whole again


def test_a_cache_that_cannot_be_written_is_done_without(model, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    age(model)
    assert name_of(model) == name_of(model)


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_the_manifest_is_believed_as_long_as_no_file_is_newer(model, tmp_path, to):
    convert(model, tmp_path / "out", to=to)
    before = name_of(tmp_path / "out")
    assert before == name_of(model)
    data = tmp_path / "out" / (WEIGHTS if to == "hf" else "weights/__0_0.distcp")
    overwrite_in_place(data, keep_time=True)
    assert name_of(tmp_path / "out") == before  # nothing was read
    if to == "hf":
        os.utime(data)
        with ignoring_manifests():
            assert name_of(tmp_path / "out") != before
