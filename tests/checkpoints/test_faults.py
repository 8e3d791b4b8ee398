"""Whatever goes wrong in a conversion: one sentence, nothing that looks finished, and the next run works."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.cli.main import main
from nemo_pvs.errors import UserError
from tests.conftest import make_tiny_llama

NORM = "model.layers.1.input_layernorm.weight"


class Folder:
    """A Hugging Face folder of several shards, and ways to break it."""

    def __init__(self, path):
        self.path = path
        self.index = path / "model.safetensors.index.json"
        self.shards = sorted(path.glob("model-*.safetensors"))

    @property
    def weight_map(self):
        return json.loads(self.index.read_text())["weight_map"]

    def edit_index(self, change):
        content = json.loads(self.index.read_text())
        change(content["weight_map"])
        self.index.write_text(json.dumps(content))

    def edit_shard(self, change, name=NORM):
        path = self.path / self.weight_map[name]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def edit_config(self, **changes):
        path = self.path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def truncated_shard(self):
        self.shards[1].write_bytes(self.shards[1].read_bytes()[:-1])

    def empty_shard(self):
        self.shards[1].write_bytes(b"")

    def missing_shards(self):
        for shard in self.shards[:2]:
            shard.unlink()

    def index_names_a_missing_file(self):
        self.edit_index(lambda names: names.update({NORM: "model-00009-of-00009.safetensors"}))

    def quantised_tensor(self):
        self.edit_shard(lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)}))

    def tensor_of_another_size(self):
        self.edit_shard(lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()}))

    def missing_tensor(self):
        self.edit_shard(lambda tensors: tensors.pop(NORM))
        self.edit_index(lambda names: names.pop(NORM))

    def tensor_missing_in_its_file(self):
        self.edit_shard(lambda tensors: tensors.pop(NORM))

    def duplicated_tensor(self):
        other = next(name for name, file in self.weight_map.items() if file != self.weight_map[NORM])
        self.edit_shard(lambda tensors: tensors.update({NORM: torch.ones(64)}), name=other)

    def extra_tensor(self):
        self.edit_shard(lambda tensors: tensors.update({"model.layers.1.mlp.gate_proj.lora_A": torch.ones(4, 4)}))

    def wrong_config(self):
        self.edit_config(num_hidden_layers=5)

    def impossible_config(self):
        self.edit_config(num_attention_heads=7)

    def broken_config(self):
        (self.path / "config.json").write_text("{")


FAULTS = {
    "truncated_shard": r"model-00002-of-\d+\.safetensors is not a complete safetensors file",
    "empty_shard": r"model-00002-of-\d+\.safetensors is not a complete safetensors file",
    "missing_shards": r"model-00001-of-\d+\.safetensors, model-00002-of-\d+\.safetensors of .*hf are missing",
    "index_names_a_missing_file": r"model-00009-of-00009\.safetensors of .* is missing",
    "quantised_tensor": rf"{NORM} in .* is stored as I8",
    "tensor_of_another_size": rf"{NORM} in .* is \[63\], but config\.json implies \[64\]",
    "missing_tensor": rf"lacks 1 tensors .*: {NORM};",
    "tensor_missing_in_its_file": rf"{NORM} is not in the file of .* that its index names",
    "duplicated_tensor": rf"{NORM} is in more than one file",
    "extra_tensor": r"1 tensors that LlamaForCausalLM .* does not have: model\.layers\.1\.mlp\.gate_proj\.lora_A;",
    "wrong_config": r"lacks 9 tensors .*: (model\.layers\.4\.\S+ ){3}and 6 more;",
    "impossible_config": r"7 query heads cannot be shared by 2 KV groups",
    "broken_config": r"config\.json is not valid JSON",
}


@pytest.fixture
def folder(tmp_path):
    made = Folder(make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16, max_shard_size="60KB"))
    assert len(made.shards) > 4
    return made


def assert_refused(message, source, target, **options):
    """The fault is one sentence, and the target's folder looks as if nobody had been there."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        convert(source, target, **options)
    assert "\n" not in str(caught.value)
    assert sorted(target.parent.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_huggingface_folders(folder, tmp_path, fault):
    good = tmp_path / "good"
    shutil.copytree(folder.path, good)
    getattr(folder, fault)()
    read = []
    for to in ("nemo", "hf"):
        assert_refused(FAULTS[fault], folder.path, tmp_path / "out", to=to, progress=lambda *_: read.append(1))
    assert not read  # all of these are found before the first weight is read
    shutil.rmtree(folder.path)
    good.rename(folder.path)
    convert(folder.path, tmp_path / "out", to="nemo")


def test_the_command_line_says_it_in_one_line(folder, tmp_path, monkeypatch, capsys):
    folder.truncated_shard()
    monkeypatch.setattr(sys, "argv", ["pvs", "convert", str(folder.path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("pvs: ")
    assert errors.count("\n") == 1
    assert "not a complete safetensors file" in errors


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_refused_by_name(folder, tmp_path, value):
    name = "model.layers.2.mlp.up_proj.weight"
    folder.edit_shard(lambda tensors: tensors[name].view(-1)[-1].fill_(value), name=name)
    for to in ("hf", "nemo"):
        assert_refused(name, folder.path, tmp_path / "out", to=to)
    there = convert(folder.path, tmp_path / "nemo", to="nemo", allow_nonfinite=True)
    assert_refused(name, tmp_path / "nemo", tmp_path / "out", to="hf")
    back = convert(tmp_path / "nemo", tmp_path / "out", to="hf", allow_nonfinite=True)
    assert there.tensors == back.tensors
    assert not load_file(tmp_path / "out" / "model.safetensors")[name].isfinite().all()


@pytest.fixture
def nemo(folder, tmp_path):
    convert(folder.path, tmp_path / "nemo", to="nemo")
    return tmp_path / "nemo"


def _edit_metadata(nemo, change):
    path = nemo / "weights" / ".metadata"
    described = pickle.loads(path.read_bytes())  # we wrote it a moment ago
    change(described.state_dict_metadata)
    path.write_bytes(pickle.dumps(described))


def _rename_a_tensor(described):
    described["module.decoder.layers.mlp.linear_fc2.wait"] = described.pop(
        "module.decoder.layers.mlp.linear_fc2.weight"
    )


def _add_a_bias(described):
    described["module.decoder.layers.mlp.linear_fc2.bias"] = described["module.decoder.final_layernorm.weight"]


NEMO_FAULTS = {
    "truncated data": (
        lambda nemo: os.truncate(nemo / "weights" / "__0_0.distcp", 100_000),
        r"Cannot read module\.\S+ from",
    ),
    "no data": (lambda nemo: (nemo / "weights" / "__0_0.distcp").unlink(), r"Cannot read module\.\S+ from"),
    "truncated description": (lambda nemo: os.truncate(nemo / "weights" / ".metadata", 500), r"\.metadata is broken"),
    "no description": (lambda nemo: (nemo / "weights" / ".metadata").unlink(), r"has no \.metadata file"),
    "no context": (lambda nemo: shutil.rmtree(nemo / "context"), r"io\.json does not exist"),
    "missing tensor": (
        lambda nemo: _edit_metadata(nemo, _rename_a_tensor),
        r"no tensor module\.\S+linear_fc2\.weight",
    ),
    "extra tensor": (lambda nemo: _edit_metadata(nemo, _add_a_bias), r"does not have: module\.\S+linear_fc2\.bias"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", NEMO_FAULTS)
def test_broken_nemo_checkpoints(nemo, tmp_path, fault):
    damage, message = NEMO_FAULTS[fault]
    damage(nemo)
    for to in ("hf", "nemo"):
        assert_refused(message, nemo, tmp_path / "out", to=to)


class Bomb:
    def __init__(self, path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_bombs_in_a_nemo_checkpoint_do_not_run(nemo, tmp_path):
    torch.save({"x": Bomb(tmp_path / "ran")}, nemo / "weights" / "common.pt")
    convert(nemo, tmp_path / "out", to="hf")  # of a NeMo checkpoint nobody opens common.pt
    content = pickle.dumps(Metadata({}, planner_data=Bomb(tmp_path / "ran")))
    (nemo / "weights" / ".metadata").write_bytes(content)
    shutil.copytree(nemo / "weights", tmp_path / "raw")
    for source in (nemo, tmp_path / "raw"):
        assert_refused(r"names \w+\.system, which .* could run code", source, tmp_path / "again", to="hf")
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # the proof that it would have
    assert (tmp_path / "ran").exists()


# --- disks


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of so many bytes, which takes root; elsewhere there is nothing to fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = []

    def mount(size, *options):
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
            mounted.clear()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs root to mount a small file system")
        mounted.append(disk)
        return disk

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _blocks(folder):
    """Return the bytes of a folder in pages, and a page for each file or folder, which tmpfs takes at most."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in [folder, *folder.rglob("*")])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "nemo"])
@pytest.mark.parametrize("source", ["hf", "nemo"])
def test_a_full_disk_leaves_nothing(folder, nemo, tmp_path, small_disk, source, to):
    origin = {"hf": folder.path, "nemo": nemo}[source]
    whole = convert(origin, tmp_path / "whole", to=to)
    needed = _blocks(tmp_path / "whole")
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*"))
    for size in (4096, 65536, largest - 4096, largest + 8192):
        disk = small_disk(size)
        assert_refused("the disk is full", origin, disk / "out", to=to)
    disk = small_disk(2 * needed)
    assert convert(origin, disk / "out", to=to) == whole


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_a_read_only_target_is_named(folder, small_disk, to):
    disk = small_disk(4_000_000, "ro")
    assert_refused(rf"Cannot write {disk}/out: the file system is read-only", folder.path, disk / "out", to=to)
