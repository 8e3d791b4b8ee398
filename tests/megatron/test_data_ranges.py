"""Which tokens a run reads: real datasets of Megatron and NeMo, and a run with the paper's schedule."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.learning_rate import quadratic_warmup_cosine
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import tiny_job
from tests.megatron.ranks import run_ranks, write_tokens

pytestmark = pytest.mark.parallel

SEQUENCE = 16
BATCH = 4


def _served(job: TrainingJob, steps: int, ranks: int) -> list[list[str]]:
    """Return a hash of every sample, optimizer step by optimizer step, as ``ranks`` data-parallel ranks get them."""
    import fiddle
    from nemo.lightning.data import MegatronPretrainingSampler

    from nemo_pvs.megatron.pretrain import data_module
    from nemo_pvs.training.machine import Machine

    module = fiddle.build(data_module(job, Machine.here()))
    module.build(steps, 1, 1.0, 0)
    dataset = module._train_ds
    samplers = [
        iter(
            MegatronPretrainingSampler(
                total_samples=len(dataset),
                consumed_samples=0,
                micro_batch_size=1,
                global_batch_size=BATCH,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
        )
        for rank in range(ranks)
    ]
    served: list[list[str]] = []
    for _ in range(steps):
        step = []
        while len(step) < BATCH:
            for sampler in samplers:
                step += [hashlib.sha256(dataset[i]["tokens"].numpy().tobytes()).hexdigest() for i in next(sampler)]
        served.append(sorted(step))
    return served


def _ranges(job: TrainingJob, more: list[str]) -> dict[str, object]:
    """Read several ranges of the same data, and return the hashes."""
    import torch

    from nemo_pvs.errors import UserError

    torch.distributed.init_process_group("gloo")
    step = BATCH * SEQUENCE
    replace(job, training=job.training.model_copy(update={"tokens": 20.0 * step})).build_index()
    prepared = {path.name: path.stat().st_mtime_ns for path in job.index.iterdir()}
    assert len(prepared) == 4
    whole = _served(job, 20, 1)
    for_training = {path.name: path.stat().st_mtime_ns for path in job.index.glob("*-train-*")}
    assert for_training == prepared, "the ranks have built what was there, or something else"
    found: dict[str, object] = {
        "whole": whole,
        "start": _served(job, 8, 1),
        "on two ranks": _served(job, 8, 2),
        "later": _served(replace(job, first_token=8 * step), 12, 1),
        "later on two ranks": _served(replace(job, first_token=8 * step), 12, 2),
    }
    for name, seeds in (("kept", {"seed": 7, "data_seed": job.training.seed}), ("another", {"seed": 7})):
        found[f"order {name}"] = _served(replace(job, training=job.training.model_copy(update=seeds)), 8, 1)
    for name, train in (("weighed", ["0.75", more[0], "0.25", more[1]]), ("by size", more)):
        blend = replace(job, data={**job.data, "train": train})
        replace(blend, training=job.training.model_copy(update={"tokens": 20.0 * step})).build_index()
        prepared = {path.name for path in job.index.iterdir()}
        found[name] = _served(blend, 20, 1)
        assert {path.name for path in job.index.iterdir()} == prepared, name
        found[f"{name}, later"] = _served(replace(blend, first_token=8 * step), 12, 1)
    try:
        _served(replace(job, first_token=1000 * step), 20, 1)
    except UserError as error:
        found["past the end"] = str(error)
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    folder = tmp_path_factory.mktemp("ranges")
    job = tiny_job(
        folder,
        save_tiny_tokenizer(make_tiny_llama(folder / "model", tie_word_embeddings=False)),
        steps=10,
        text=[2 + index * index % 97 + index % 29 for index in range(3000)],
        sequence_length=SEQUENCE,
        global_batch_size=BATCH,
        micro_batch_size=1,
        learning_rate=1e-3,
        warmup="quadratic",
        warmup_fraction=0.3,
        weight_decay_on="all",
        validations=1,
        validation_samples=4,
        checkpoints=1,
    )
    return replace(job, first_token=5 * BATCH * SEQUENCE)


def test_ranges_are_pieces_of_one_order(job, tmp_path):
    more = [
        write_tokens(tmp_path / name, [2 + index * seed % 101 for index in range(2500)])
        for name, seed in (("a", 31), ("b", 43))
    ]
    for file in Path(job.data["validation"]).parent.glob(Path(job.data["validation"]).name + ".*"):
        shutil.copy(file, tmp_path / f"validation{file.suffix}")  # next to which the index is built
    own = replace(job, first_token=0, data={**job.data, "validation": str(tmp_path / "validation")})
    (found,) = run_ranks(1, _ranges, own, more)
    whole = found["whole"]
    assert whole[:8] == found["start"] == found["on two ranks"]
    assert whole[8:] == found["later"] == found["later on two ranks"]
    assert found["order kept"] == found["start"] != found["order another"], "data_seed fixes the order of the data"
    assert not {sample for step in found["start"] for sample in step} & {
        sample for step in found["later"] for sample in step
    }
    for blend in ("weighed", "by size"):
        assert found[blend][8:] == found[f"{blend}, later"]
        assert found[blend] != whole
    assert "Training reads" in found["past the end"]


def _train(job: TrainingJob) -> list[float]:
    from nemo_pvs.megatron import rank

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    decays: list[float] = []
    original = rank.pretrain_recipe

    def watched(job):
        import lightning.pytorch as pl

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer, *_):
                decays.extend(group["weight_decay"] for group in trainer.optimizers[0].param_groups)

        recipe = original(job)
        recipe.trainer.callbacks.append(Watch())
        return recipe

    rank.pretrain_recipe = watched
    rank.train_on_cpu(job)
    return decays


def test_a_run_with_the_papers_schedule_and_a_range(job: TrainingJob):
    Path(job.folder).mkdir(exist_ok=True)
    (decays,) = run_ranks(1, _train, job)
    assert set(decays) == {job.training.weight_decay}, "norms are spared"
    measured = [point["learning_rate"] for point in metrics.read(job.metrics).training]
    steps = job.training.steps
    expected = [
        1e-3 * quadratic_warmup_cosine(step, steps=steps, warmup_steps=3, min_ratio=0.1) for step in range(steps)
    ]
    assert measured == pytest.approx(expected)
