"""Optimizer state that is carried through a pruning, on Megatron's own optimizers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.nemo.optimizer_state import MASTERS, MOMENTS, OptimizerStateSource, states_in
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.optimizer_state import slice_optimizer_state
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.training import metrics
from nemo_pvs.training.job import CarriedState, TrainingJob
from nemo_pvs.training.trainer import Trainer, last_checkpoint
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import SEQUENCE, tiny_job
from tests.megatron.ranks import run_ranks
from tests.pruning.test_plan import make_plan

pytestmark = pytest.mark.parallel

HALF = 4
LAYOUTS = {
    "one process": {},
    "TP=2": {"tensor_parallel": 2},
    "PP=2": {"pipeline_parallel": 2},
    "DP=2": {"data_parallel": 2, "distributed_optimizer": True},
}


def _train(job: TrainingJob) -> None:
    from nemo_pvs.megatron.rank import train_on_cpu

    job.folder.mkdir(exist_ok=True)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train_on_cpu(job)


def run(job: TrainingJob, folder: Path, **layout) -> TrainingJob:
    job = replace(job, folder=folder, layout=Parallelism(**layout))
    run_ranks(job.layout.processes, _train, job)
    return job


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def whole(request, tmp_path_factory) -> TrainingJob:
    """Eight steps without a break, tied embeddings."""
    folder = tmp_path_factory.mktemp("carried")
    model = save_tiny_tokenizer(make_tiny_llama(folder / "model", tie_word_embeddings=True))
    job = tiny_job(folder, model, steps=2 * HALF, precision=request.param, checkpoints=1)
    return run(replace(job, all_steps=2 * HALF), folder / "whole")


@pytest.fixture(scope="module")
def first(whole) -> TrainingJob:
    """Its first half, with the distributed optimizer."""
    half = whole.training.model_copy(update={"tokens": float(HALF * whole.training.tokens_per_step)})
    job = replace(whole, training=half)
    return run(job, whole.folder.parent / "first", **LAYOUTS["DP=2"])


def second(first: TrainingJob, folder: Path, plan, carried: bool = True) -> TrainingJob:
    """The second half of what a plan leaves; None for all of it."""
    folder.mkdir()
    trained = NemoSource(last_checkpoint(first))
    write_nemo(trained if plan is None else PrunedSource(trained, plan), folder / "initial")
    if plan is not None:
        plan.save(folder / "plan.json")
    return replace(
        first,
        initial=folder / "initial",
        first_step=HALF,
        first_token=HALF * 8 * SEQUENCE,
        carried=CarriedState(first.checkpoints, plan and folder / "plan.json") if carried else None,
    )


def losses(job: TrainingJob) -> list[float]:
    return [point["loss"] for point in metrics.read(job.metrics).training]


def test_without_pruning_it_goes_on_as_if_it_had_not_stopped(whole, first, tmp_path):
    in_fp32 = whole.training.precision == "fp32"
    layout = LAYOUTS["TP=2" if in_fp32 else "DP=2"]
    job = run(second(first, tmp_path / "second", None), tmp_path / "second" / "run", **layout)
    expected = losses(whole)[HALF:]
    assert losses(job) == pytest.approx(expected, abs=1e-6 if in_fp32 else 2e-3)
    if in_fp32:
        reset = run(second(first, tmp_path / "reset", None, carried=False), tmp_path / "reset" / "run")
        assert losses(reset) != pytest.approx(expected, abs=5e-3), "moments that start from zero would pass, too"


def test_ranks_begin_with_what_the_plan_keeps(first, tmp_path):
    """Betas of almost 1 and no learning rate leave the state as it was loaded, in the next checkpoint."""
    trained = NemoSource(last_checkpoint(first))
    plan = replace(make_plan(shape_of(trained), layers=2), provenance={"model_fingerprint": fingerprint(trained)})
    sliced = slice_optimizer_state(last_checkpoint(first), plan)
    in_fp32 = first.training.precision == "fp32"
    assert set(sliced) >= ({"exp_avg", "exp_avg_sq"} if in_fp32 else {"exp_avg", "exp_avg_sq", "param"})
    still = {"tokens": 1.0, "adam_betas": (1 - 1e-9, 1 - 1e-9), "learning_rate": 1e-30}
    for name in ["DP=2"] if in_fp32 else LAYOUTS:
        job = second(first, tmp_path / name, plan)
        job = replace(job, training=job.training.model_copy(update=still))
        job = run(job, tmp_path / name / "run", **LAYOUTS[name])
        saved = NemoSource(last_checkpoint(job))
        states = {state: OptimizerStateSource(last_checkpoint(job), state) for state in states_in(saved)}
        assert set(states) - set(MASTERS) == set(sliced) - set(MASTERS)
        for weight in Layout.for_config(saved.config).parts(shape_of(saved)):
            for state in MOMENTS:
                expected = sliced[state].read(weight)
                rounding = 1e-6 * float(expected.abs().max())
                torch.testing.assert_close(states[state].read(weight), expected, rtol=1e-5, atol=rounding)
            for master in set(states) & set(MASTERS):
                kept = next(sliced[state] for state in MASTERS if state in sliced)
                assert torch.equal(states[master].read(weight), kept.read(weight)), f"{weight} of {name}"


def test_a_state_that_is_gone_is_asked_for(first, tmp_path):
    gone = tmp_path / "train" / "half-stages" / "1" / "nemo" / "checkpoints"
    job = replace(second(first, tmp_path / "second", None), folder=tmp_path / "run")
    job = replace(job, carried=CarriedState(gone, None))
    with pytest.raises(UserError, match="--force train/half/stage-1"), Trainer(tmp_path / "log") as trainer:
        trainer.train(TrainingJob.load(job.save()))
