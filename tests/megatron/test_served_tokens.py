"""What the data loader really serves: the same tokens in the same order to every arm, each counted once."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import islice

import pytest
import torch

from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.planning.charges import charge_training
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import SEQUENCE, tiny_job
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel

STEPS = 12
SAVED_AT = 6
BATCH = 8


def _train(job: TrainingJob, dying_rank: int | None, dies_at: int) -> None:
    """Be a rank that writes down a hash of every sequence it is given to train on, and may die at a step."""
    import lightning.pytorch as pl

    from nemo_pvs.megatron import rank as rank_process

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    rank = int(os.environ["RANK"])

    class Recorder(pl.Callback):
        def on_megatron_microbatches_start(self, step):
            if step.forward_only:
                return
            batches = list(islice(step.data, step.num_microbatches))
            step.data = iter(batches)
            rows = [row for batch in batches for row in _tokens(batch)]
            with open(job.folder / f"served-{rank}.jsonl", "a") as file:
                print(json.dumps([step.trainer.global_step, rows]), file=file)
            if rank == dying_rank and step.trainer.global_step == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    original = rank_process.pretrain_recipe

    def recorded(job):
        recipe = original(job)
        recipe.trainer.callbacks.append(Recorder())
        return recipe

    rank_process.pretrain_recipe = recorded
    rank_process.train_on_cpu(job)


def _tokens(batch) -> list[str]:
    """Return a hash of each sequence of a micro-batch."""
    data = batch[0] if isinstance(batch, (tuple, list)) else batch
    return [sha256(row.numpy().tobytes()).hexdigest() for row in data["tokens"].cpu()]


def _run(job: TrainingJob, dying_rank: int | None = None, dies_at: int = -1) -> metrics.Metrics:
    job.folder.mkdir(exist_ok=True)
    run_ranks(job.layout.processes, _train, job, dying_rank, dies_at)
    return metrics.read(job.metrics)


def _served(job: TrainingJob) -> dict[int, Counter[str]]:
    """Return the sequences of each step over all replicas, as they were served last: a resumed run repeats steps."""
    steps: dict[int, Counter[str]] = {}
    for file in job.folder.glob("served-*.jsonl"):
        last = dict(map(json.loads, file.read_text().splitlines()))
        for step, rows in last.items():
            steps.setdefault(step, Counter()).update(rows)
    return steps


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> tuple[TrainingJob, TrainingJob]:
    """Two arms of a comparison: other weights, another shape, the same data and seed."""
    folder = tmp_path_factory.mktemp("arms")
    text = torch.randint(3, 128, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    jobs = []
    for name, layers in (("pruned", 2), ("random", 4)):
        (folder / name).mkdir()
        model = save_tiny_tokenizer(make_tiny_llama(folder / name / "model", seed=layers, num_hidden_layers=layers))
        jobs.append(tiny_job(folder / name, model, steps=STEPS, text=text))
    return replace(jobs[0], layout=Parallelism()), replace(
        jobs[1], layout=Parallelism(data_parallel=2), data=jobs[0].data
    )


@pytest.mark.parametrize("dying_rank", [0, 1])
def test_arms_read_the_same_tokens_and_a_killed_one_goes_on_exactly(arms, dying_rank, tmp_path):
    one, other = arms
    if not one.folder.exists():
        _run(one)
        _run(other)
    doomed = replace(other, folder=tmp_path / "doomed")
    with pytest.raises(AssertionError, match="died without a word"):
        _run(doomed, dying_rank, SAVED_AT + 2)
    curve = _run(doomed)

    expected = _served(one)
    assert sorted(expected) == list(range(STEPS))
    assert _served(other) == _served(doomed) == expected
    everything = sum(expected.values(), Counter())
    assert everything.total() == STEPS * BATCH
    assert set(everything.values()) == {1}, "a sequence is served twice within one pass over the text"

    # What the curve and the ledger count is what was served.
    for arm in (one, other, doomed):
        assert metrics.read(arm.metrics).training[-1]["tokens"] == everything.total() * SEQUENCE
    ledger = Ledger()
    charge_training(ledger, other.training, shape_of(NemoSource(other.initial)), 0)
    assert ledger.training.tokens == everything.total() * SEQUENCE

    losses = [[point["loss"] for point in one_curve.training] for one_curve in (curve, metrics.read(other.metrics))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
