"""Scores on disk: bit-exact round trips, and refusal of what is damaged or belongs to another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from tests.state_source import StateSource, random_ids, tiny_model


def make_scores(source: StateSource, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.rand(*size, generator=generator, dtype=torch.float64)
        for name, size in {"hidden.energy": (64,), "ffn.energy": (4, 96), "heads.energy": (4, 8)}.items()
    }
    manifest = {
        "model_fingerprint": fingerprint(source),
        "shape": shape_of(source).to_dict(),
        "tokens": {"samples": 2},
        "versions": {"torch": torch.__version__},
    }
    return Scores({**tensors, "tokens": random_ids(2, 8)}, manifest)


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    source = StateSource(tiny_model())
    scores = make_scores(source)
    scores.save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores", source)
    assert loaded.manifest == scores.manifest
    assert loaded.tensors.keys() == scores.tensors.keys()
    for name, tensor in scores.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert loaded.content_hash == scores.content_hash
    assert loaded.shape == shape_of(source)


def test_the_hash_follows_numbers_and_model_but_not_versions() -> None:
    source = StateSource(tiny_model())
    scores = make_scores(source)
    newer = Scores(scores.tensors, {**scores.manifest, "versions": {"torch": "99"}})
    assert newer.content_hash == scores.content_hash
    assert make_scores(source, seed=1).content_hash != scores.content_hash
    assert make_scores(StateSource(tiny_model(seed=1))).content_hash != scores.content_hash


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    make_scores(StateSource(tiny_model())).save(tmp_path / "scores")
    with pytest.raises(UserError, match="measured on another model"):
        Scores.load(tmp_path / "scores", StateSource(tiny_model(seed=1)))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "unsigned"])
def test_damaged_scores_are_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    make_scores(StateSource(tiny_model())).save(folder)
    tensors = folder / "scores.safetensors"
    data = tensors.read_bytes()
    if damage == "cut":
        tensors.write_bytes(data[:-9])
    elif damage == "changed":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        tensors.unlink()
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["sha256"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged or incomplete"):
        Scores.load(folder)


def test_a_folder_without_scores_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Scores.load(tmp_path)


def test_existing_scores_are_replaced_only_when_asked(tmp_path: Path) -> None:
    first, second = (make_scores(StateSource(tiny_model()), seed=seed) for seed in (0, 1))
    first.save(tmp_path / "scores")
    with pytest.raises(UserError, match="already exists"):
        second.save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").content_hash == first.content_hash
    second.save(tmp_path / "scores", overwrite=True)
    assert Scores.load(tmp_path / "scores").content_hash == second.content_hash


def test_what_was_not_measured_is_named() -> None:
    scores = make_scores(StateSource(tiny_model()))
    assert torch.equal(scores.channels("ffn", "energy"), scores.tensors["ffn.energy"])
    with pytest.raises(UserError, match=r"lack attention\.variance; calibrate again"):
        scores.channels("attention", "variance")
