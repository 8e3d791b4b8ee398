"""Curves from TensorBoard's event files and from W&B's exports."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.compare.curves import take_curves
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.results import Point, Results
from nemo_pvs.reporting.training_log import validation_losses


def _write(folder: Path, losses: dict[int, float], *, began: float = 1000.0, tag: str = "val_loss") -> Path:
    """Write an event file as Lightning does: what was measured after 100 steps stands at step 99."""
    with SummaryWriter(str(folder), filename_suffix=f".{began}") as writer:
        for number, (steps, loss) in enumerate(losses.items()):
            writer.add_scalar(tag, loss, steps - 1, walltime=began + number)
            writer.add_scalar("reduced_train_loss", loss + 0.1, steps - 1, walltime=began + number)
    return folder


def test_steps_are_those_done(tmp_path: Path) -> None:
    assert validation_losses(_write(tmp_path, {4: 3.5, 8: 3.25})) == {4: 3.5, 8: 3.25}


def test_what_a_resumed_run_measured_again_counts(tmp_path: Path) -> None:
    _write(tmp_path, {4: 3.5, 8: 3.25, 12: 3.0}, began=1000)
    _write(tmp_path, {8: 3.125, 16: 2.75}, began=2000)
    assert validation_losses(tmp_path) == {4: 3.5, 8: 3.125, 12: 3.0, 16: 2.75}


@pytest.mark.parametrize("name", ["val_loss", "width-pruned - val_loss"])
def test_an_export_of_weights_and_biases(tmp_path: Path, name: str) -> None:
    log = tmp_path / "export.csv"
    table = f'"trainer/global_step","{name}","{name}__MIN"\n3,3.5,3.5\n5,,\n7,3.25,3.25\n'
    log.write_text(table)
    assert validation_losses(log) == {4: 3.5, 8: 3.25}
    log.write_text(table, encoding="utf-8-sig")
    assert validation_losses(log) == {4: 3.5, 8: 3.25}, "as Excel saves it"


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        validation_losses(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no events\.out\.tfevents file"):
        validation_losses(tmp_path)
    _write(tmp_path / "a", {1: 2.0}, tag="loss/val")
    with pytest.raises(UserError, match="has no val_loss, but loss/val, reduced_train_loss"):
        validation_losses(tmp_path / "a")
    _write(tmp_path / "b", {1: 2.0})
    with pytest.raises(UserError, match=r"logs of several runs; give one of .*a, .*b"):
        validation_losses(tmp_path)
    with pytest.raises(UserError, match="loss of nan after 5 steps"):
        validation_losses(_write(tmp_path / "c", {5: math.nan}))
    (tmp_path / "steps.csv").write_text("Step,val_loss\n3,3.5\n")
    with pytest.raises(UserError, match=r"needs the columns trainer/global_step .* \(it has Step, val_loss\)"):
        validation_losses(tmp_path / "steps.csv")
    (tmp_path / "empty.csv").write_text("trainer/global_step,val_loss\n3,\n")
    with pytest.raises(UserError, match="has no row with a val_loss"):
        validation_losses(tmp_path / "empty.csv")
    (tmp_path / "words.csv").write_text("trainer/global_step,val_loss\n3,low\n")
    with pytest.raises(UserError, match="'low'"):
        validation_losses(tmp_path / "words.csv")
    (tmp_path / "bytes.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"bytes\.csv"):
        validation_losses(tmp_path / "bytes.csv")


@pytest.mark.parametrize("interval", [1, 2, 5, 8])
def test_a_resumed_run_that_numbers_its_validations_too_low(tmp_path: Path, interval: int) -> None:
    """Lightning's rule, run here: its count of batches falls one behind each time, NeMo's ``global_step`` does not."""
    batches, began = 0, 1000.0
    for first, last in [(0, 30), (30, 49), (49, 80)]:
        with SummaryWriter(str(tmp_path), filename_suffix=f".{first}") as writer:
            for step in range(first, last):
                began += 1
                if (batches + 1) % interval == 0:
                    writer.add_scalar("global_step", step, step, walltime=began)
                if (step + 1) % 12 == 0:
                    writer.add_scalar("val_loss", 4 - (step + 1) / 32, batches, walltime=began + 0.5)
                batches += 1
        batches -= 1
    assert validation_losses(tmp_path) == {steps: 4 - steps / 32 for steps in range(12, 80, 12)}


def test_a_log_cut_short_is_read_to_the_cut(tmp_path: Path) -> None:
    """A killed run leaves half a record."""
    [file] = _write(tmp_path, {4: 3.5, 8: 3.25}).iterdir()
    file.write_bytes(file.read_bytes()[:-60])  # the last training loss, and a part of the validation loss before it
    assert validation_losses(tmp_path) == {4: 3.5}


@pytest.fixture
def run(results: Results) -> Run:
    results.recipe["train"] = {"global_batch_size": 128, "sequence_length": 64}  # 5 steps to the 40,960 tokens
    return Run("runs/demo", results)


def test_an_arm_takes_its_curve_from_a_log(run: Run, tmp_path: Path) -> None:
    start, others = run.results.arms[0].validation[0], [arm.validation for arm in run.results.arms[1:]]
    take_curves([run], [f"depth, pruned={_write(tmp_path, {2: 3.0, 5: 2.0})}"])
    assert run.results.arms[0].validation == [start, Point(2, 16384, 3.0), Point(5, 40960, 2.0)]
    assert [arm.validation for arm in run.results.arms[1:]] == others
    assert len(run.results.hashes["log of depth, pruned"]) == 64


def test_a_log_of_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    log = _write(tmp_path, {6: 3.0})
    with pytest.raises(UserError, match="goes on to 49,152 tokens, but depth, pruned was trained on 40,960"):
        take_curves([run], [f"depth, pruned={log}"])
    with pytest.raises(UserError, match="names 0 arms; write ARM=LOG, with one of 'runs/demo: depth, pruned'"):
        take_curves([run], [f"depth={log}"])
    with pytest.raises(UserError, match="names 2 arms"):
        take_curves([run, Run("runs/other", run.results)], [f"depth, pruned={log}"])
