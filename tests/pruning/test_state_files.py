"""Files on which a resumed training or a plan depends are on the disk before they get their names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.input_means import InputMeans
from nemo_pvs.pruning.learned.kept_units import KeptUnits
from nemo_pvs.pruning.learned.mask_learning import MaskLearner, MaskSettings
from nemo_pvs.pruning.learned.sheared import load_gates, save_masks
from nemo_pvs.pruning.learned.unit_space import UnitSpace

SHAPE = Shape(layers=2, hidden=8, ffn=6, heads=2, kv_groups=2, head_dim=4, vocab=16, tied=True)
TARGET = SHAPE.replace(ffn=4)


def kept_units(path: Path) -> None:
    KeptUnits.everything(UnitSpace(SHAPE)).save(path)
    assert torch.equal(KeptUnits.load(path, UnitSpace(SHAPE)).kept, UnitSpace(SHAPE).everything())


def masks(path: Path) -> None:
    learner = MaskLearner(SHAPE, TARGET, MaskSettings())
    with torch.no_grad():
        learner.log_alpha["ffn"][:, 4:] = -4.0
    save_masks(path, learner)
    assert torch.equal(load_gates(path, TARGET).ffn, learner.deterministic().ffn)


def input_means(path: Path) -> None:
    means = InputMeans.of([torch.ones(3)], [torch.zeros(2)])
    means.save(path)
    assert InputMeans.load(path, means.content_hash) == means


@pytest.mark.parametrize("save", [kept_units, masks, input_means])
def test_files_are_flushed_before_they_are_renamed(
    save: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses power after a rename would otherwise be left with an empty file under the final name."""
    flushed, renamed = list[str](), list[bool]()
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(partial: Path, path: Path) -> None:
        renamed.append(str(partial) in flushed)
        replace(partial, path)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    save(tmp_path / "below" / "state")
    assert renamed == [True]
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["state"]
