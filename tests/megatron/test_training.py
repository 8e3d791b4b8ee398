"""Real NeMo training over gloo: the loss curve does not depend on how a run is spread over processes."""

import contextlib
import itertools
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.windows import validation_windows
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import Trainer, is_finished, last_checkpoint
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.gpu_settings import set_up_as_on_gpus
from tests.megatron.jobs import SEQUENCE, VALIDATION_SAMPLES, accumulating, tiny_job
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel

STEPS = 8


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A run of eight steps in fp32 on text that can be learned; tests choose the layout and the folder."""
    folder = tmp_path_factory.mktemp("job")
    model = save_tiny_tokenizer(make_tiny_llama(folder / "model", tie_word_embeddings=False))
    return tiny_job(folder, model, steps=STEPS, learning_rate=5e-3, validations=4)


def _train(job: TrainingJob, die_at_step: int = 0, end_by: int = signal.SIGKILL, as_on_gpus: bool = False) -> None:
    import os

    import lightning.pytorch as pl

    from nemo_pvs.megatron import rank

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if as_on_gpus:
        set_up_as_on_gpus()
    if die_at_step:

        class Die(pl.Callback):
            def on_train_batch_start(self, trainer, *_):
                if trainer.global_step == die_at_step and trainer.global_rank == trainer.world_size - 1:
                    os.kill(os.getpid(), end_by)

        original = rank.pretrain_recipe

        def doomed(job):
            recipe = original(job)
            recipe.trainer.callbacks.append(Die())
            return recipe

        rank.pretrain_recipe = doomed
    rank.train_on_cpu(job)


def _run(job: TrainingJob, folder: Path, training: dict | None = None, **layout) -> metrics.Metrics:
    job = replace(
        job,
        folder=folder,
        layout=Parallelism(**layout),
        training=job.training.model_copy(update=training or {}),
    )
    job = accumulating(job)
    folder.mkdir(exist_ok=True)
    run_ranks(job.layout.processes, _train, job)
    return metrics.read(job.metrics)


def _still_running(folder: Path) -> list[int]:
    """Return the processes whose output goes to this run's log, such as the helper of Megatron's checkpoint writer."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours
                if (process / "fd" / "1").readlink().is_relative_to(folder):
                    found.append(int(process.name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _losses(curve: metrics.Metrics) -> list[float]:
    return [point["loss"] for point in curve.training]


def _largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory) -> metrics.Metrics:
    """The curve of one process."""
    curve = _run(job, tmp_path_factory.mktemp("reference"), distributed_optimizer=False)
    assert len(curve.training) == STEPS
    assert [point["step"] for point in curve.validation] == [2, 4, 6, 8]
    assert curve.training[-1]["loss"] < curve.training[0]["loss"] - 0.5, "it does not learn"
    return curve


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2, "sequence_parallel": True, "recompute": "full"},
        {"pipeline_parallel": 2, "virtual_pipeline": 2, "recompute": "selective"},
        {"pipeline_parallel": 2, "last_stage_layers": 1},
        {"data_parallel": 2, "distributed_optimizer": False},
        {"tensor_parallel": 2, "pipeline_parallel": 2},
    ],
    ids=lambda layout: " ".join(f"{name}={value}" for name, value in layout.items()),
)
def test_every_layout_has_the_same_curve_and_its_checkpoint_reads_back(job, reference, layout, tmp_path):
    """The last checkpoint's weights, read without NeMo, have the validation loss that NeMo measured.

    The layouts that are not here are those of the killed runs below.
    """
    curve = _run(job, tmp_path / "run", **layout)
    _assert_same(curve, reference)
    trained = open_source(last_checkpoint(replace(job, folder=tmp_path / "run")))
    windows = validation_windows(Path(job.data["validation"]), samples=VALIDATION_SAMPLES, sequence_length=SEQUENCE)
    assert perplexity(trained, windows)["loss"] == pytest.approx(curve.validation[-1]["loss"], abs=1e-4)


def _assert_same(curve: metrics.Metrics, reference: metrics.Metrics) -> None:
    assert _largest_difference(_losses(curve), _losses(reference)) < 1e-4
    ours, theirs = ([point["loss"] for point in one.validation] for one in (curve, reference))
    assert _largest_difference(ours, theirs) < 1e-4


def test_bf16_follows_fp32(job, reference, tmp_path):
    curve = _run(job, tmp_path / "run", training={"precision": "bf16"}, tensor_parallel=2)
    assert _largest_difference(_losses(curve), _losses(reference)) < 0.05
    assert curve.training[-1]["loss"] < curve.training[0]["loss"] - 0.5


def _killed_at_6(job: TrainingJob, folder: Path, **layout) -> TrainingJob:
    """Return the job of a run whose last rank died after step 6 of 8."""
    folder.mkdir()
    doomed = accumulating(replace(job, folder=folder, layout=Parallelism(**layout)))
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(doomed.layout.processes, _train, doomed, 6)
    return doomed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tensor_parallel": 2}, {"pipeline_parallel": 2}),
        (
            {"pipeline_parallel": 2, "distributed_optimizer": False},
            {"tensor_parallel": 2, "distributed_optimizer": False},
        ),
        ({"data_parallel": 2}, {"data_parallel": 2}),
    ],
    ids=["TP=2 to PP=2", "PP=2 to TP=2, plain optimizer", "DP=2"],
)
def test_killed_run_goes_on_at_another_layout(job, reference, before, after, tmp_path):
    doomed = _killed_at_6(job, tmp_path / "run", **before)
    assert _still_running(doomed.folder) == [], "the checkpoint writer's helper outlives its killed rank"
    assert metrics.read(doomed.metrics).training[-1]["step"] >= 5
    curve = _run(job, doomed.folder, **after)
    resumed = doomed.log.read_text().count("step 5/8")
    assert resumed == 2, "it started over instead of at the checkpoint of step 4"
    _assert_same(curve, reference)
    assert [point["step"] for point in curve.validation] == [2, 4, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end_by", "how", "after"),
    [
        (signal.SIGKILL, "died without a word", {"data_parallel": 2}),
        (signal.SIGTERM, "SystemExit: 75", {"tensor_parallel": 2}),
    ],
    ids=["killed", "SIGTERM, then another layout"],
)
def test_the_settings_of_gpus_change_nothing(job, reference, end_by, how, after, tmp_path):
    """Asynchronous and parallel saves, overlapped reduction in several buckets, workers that read the data."""
    (tmp_path / "run").mkdir()
    first = accumulating(replace(job, folder=tmp_path / "run", layout=Parallelism(data_parallel=2)))
    with pytest.raises(AssertionError, match=how):
        run_ranks(2, _train, first, 6, end_by, True)
    second = accumulating(replace(first, layout=Parallelism(**after)))
    run_ranks(2, _train, second, 0, end_by, True)
    step = 5 if end_by == signal.SIGKILL else 7
    assert first.log.read_text().count(f"step {step}/8  tokens") == (2 if end_by == signal.SIGKILL else 1)
    _assert_same(metrics.read(first.metrics), reference)
    assert is_finished(second)


def test_tied_embeddings_on_two_stages_keep_their_optimizer_state(tmp_path):
    """They lie behind a bucket that is no multiple of 128, and Megatron alone saves others' state as theirs."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 40, "intermediate_size": 50}
    model = make_tiny_llama(tmp_path / "model", tie_word_embeddings=True, **sizes)
    save_tiny_tokenizer(model)
    job = tiny_job(tmp_path, model, steps=STEPS)
    whole = _run(job, tmp_path / "whole", distributed_optimizer=False)
    doomed = _killed_at_6(job, tmp_path / "run", pipeline_parallel=2)
    curve = _run(job, doomed.folder, tensor_parallel=2)
    assert _largest_difference(_losses(curve), _losses(whole)) < 1e-4


def test_steps_come_in_order_and_count_tokens(reference):
    for earlier, later in itertools.pairwise(reference.training):
        assert later["step"] == earlier["step"] + 1
        assert later["tokens"] - earlier["tokens"] == 8 * SEQUENCE


@pytest.mark.slow
def test_ranks_that_torchrun_starts_train_a_prepared_job(job, reference, tmp_path):
    """What Slurm and torchrun do on a cluster; afterwards the run counts as trained and no launcher is started."""
    job = replace(job, folder=tmp_path / "run", layout=Parallelism(tensor_parallel=2))
    assert not is_finished(job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "nemo_pvs.megatron.launch", str(job.save())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert _largest_difference(_losses(metrics.read(job.metrics)), _losses(reference)) < 1e-4
    assert is_finished(job)
    with Trainer(tmp_path / "launcher.log") as trainer:
        assert trainer.train(job) == last_checkpoint(job)
    assert not (tmp_path / "launcher.log").exists()
