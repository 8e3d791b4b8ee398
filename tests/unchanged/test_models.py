"""Models in other formats and shapes: the bytes of their weights, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.transforms.random import RandomSource
from tests.families import CASES, save_tiny
from tests.unchanged.models import make_exact_llama, with_exact_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file(path: Path) -> str:
    return _sha256(path.read_bytes())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _in_megatron(checkpoint: Path) -> dict[str, str]:
    """Return size, type and hash of every tensor of a NeMo checkpoint by Megatron's name, read by PyTorch itself."""
    stored = dcp.FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
    state = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in sorted(stored.items())
        if isinstance(one, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint / "weights", no_dist=True)
    return {name: f"{list(one.shape)} {one.dtype} {_sha256(_bytes(one))}" for name, one in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "about", "settings"), CASES, ids=[" ".join(case[:2]) for case in CASES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(family, about, settings, dtype, tmp_path, pvs, golden):
    source, there, back = (tmp_path / name for name in ("source", "nemo", "back"))
    with_exact_weights(save_tiny(source, family, DTYPES[dtype], **settings))
    for command in (("convert", source, there), ("convert", there, back)):
        code, _, errors = pvs(*command)
        assert code == 0, errors
    made = {
        "fingerprint": fingerprint(open_source(source)),
        "source": _file(source / "model.safetensors"),
        "Megatron": _in_megatron(there),
        "context": _file(there / "context" / "io.json"),
        "back": _file(back / "model.safetensors"),
    }
    assert fingerprint(open_source(there)) == fingerprint(open_source(back)) == made["fingerprint"]
    golden(f"models/{family} {about} {dtype}.json".replace(" ", "-"), json.dumps(made, indent=1) + "\n")


@pytest.mark.slow
def test_uneven_and_padded(tmp_path, pvs, golden):
    """FLAP without biases cuts channels of each layer; padded they are even again, and NeMo keeps them apart."""
    parent = make_exact_llama(tmp_path / "parent", num_key_value_heads=4)
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 126 + 2}" for number in range(0, 7 * 2000, 7)))
    options = ("--ratio", 0.3, "--no-bias", "--data", tmp_path / "text.txt", "--samples", 8, "--sequence-length", 32)
    pruned, there, padded = (tmp_path / name for name in ("pruned", "nemo", "padded"))
    for command in (
        ("prune", parent, pruned, "--method", "flap", *options),
        ("convert", pruned, there),
        ("convert", there, padded, "--uneven", "pad"),
    ):
        code, _, errors = pvs(*command)
        assert code == 0, errors
    made = {
        "pruned": [fingerprint(open_source(pruned)), _file(pruned / "model.safetensors")],
        "layer_shapes": json.loads((pruned / "config.json").read_text())["layer_shapes"],
        "Megatron": _in_megatron(there),
        "padded": [fingerprint(open_source(padded)), _file(padded / "model.safetensors")],
    }
    golden("models/uneven.json", json.dumps(made, indent=1) + "\n")


@pytest.mark.parametrize("scheme", ["megatron", "maxtext", "normal"])
def test_random_weights(scheme, tmp_path, recorded):
    """What training from scratch begins with; the last bits are those of the CPU's logarithm and cosine."""
    config = dict(open_source(make_exact_llama(tmp_path / "parent")).config)
    drawn = RandomSource(config, 1, initialisation=scheme)
    names = sorted(load_file(tmp_path / "parent" / "model.safetensors"))
    values = {name: drawn.read(name).flatten()[:: 1 + drawn.read(name).numel() // 8].tolist() for name in names}
    before = json.loads(recorded(f"models/random-{scheme}.json", json.dumps(values, indent=1) + "\n"))
    assert values.keys() == before.keys()
    for name, few in values.items():
        assert few == pytest.approx(before[name], abs=1e-6), name
