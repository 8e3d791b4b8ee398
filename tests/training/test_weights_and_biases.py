"""Weights & Biases is asked by its own variable, and a run there is one run folder's arm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training.job import TrainingJob
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel


def _loggers(folders: list[Path]) -> list[dict]:
    """Return what the loggers are made with, once without the variable and then with it."""
    from nemo_pvs.megatron.pretrain import weights_and_biases

    training = Training(tokens=64, sequence_length=8, global_batch_size=8, learning_rate=1e-3, validation_samples=8)
    jobs = [TrainingJob("width-pruned", folder, folder, {}, Parallelism(), training) for folder in folders]
    assert weights_and_biases(jobs[0]) is None
    os.environ["WANDB_PROJECT"] = "small-models"
    return [dict(weights_and_biases(job).__arguments__) for job in jobs]


def test_arms_of_two_runs_are_two_runs_there_and_a_requeued_one_goes_on(tmp_path):
    one, other = tmp_path / "demo" / "train" / "width-pruned", tmp_path / "demo_seed_2" / "train" / "width-pruned"
    [(first, second, again)] = run_ranks(1, _loggers, [one, other, one])
    assert first["project"] == "small-models"
    assert first["name"] == second["name"] == "width-pruned"
    assert first["id"] != second["id"]
    assert first == again
