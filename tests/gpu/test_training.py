"""Training on a GPU: curves, precisions, checkpoints, masks, distillation, and what it costs.

Every training has its own launcher, which imports NeMo, so that a failure does not affect the others.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.pruning.sparse.sequential import prune_layers
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.sparse.wanda import Wanda
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.training import metrics
from nemo_pvs.training.checkpoints import damage, saved_checkpoints
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.machine import has_transformer_engine
from nemo_pvs.training.preemption import PREEMPTED
from nemo_pvs.training.trainer import last_checkpoint
from tests.benchmarks.training_step import plain_job
from tests.megatron.jobs import tiny_job
from tests.state_source import random_ids

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

STEPS = 16
ONE_B = Shape(layers=16, hidden=2048, ffn=8192, heads=32, kv_groups=8, head_dim=64, vocab=32768, tied=False)
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(device: str) -> dict[str, str]:
    """What trainings are started with."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **({} if device.startswith("cuda") else ON_CPU)}


def _start(job: TrainingJob, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "nemo_pvs.megatron.launch", str(job.save())]
    with open(job.folder / "launcher.txt", "ab") as said:
        return subprocess.Popen(command, env=environment, stdout=said, stderr=said)


def _curve(job: TrainingJob, process: subprocess.Popen[bytes], code: int = 0) -> metrics.Metrics:
    """Wait for a launcher, and return what its job has recorded."""
    try:
        ended = process.wait(timeout=180)
    finally:
        process.kill()
    logs = [path for path in (job.folder / "launcher.txt", job.log) if path.exists()]
    assert ended == code, "\n".join(path.read_text(errors="replace")[-3000:] for path in logs)
    return metrics.read(job.metrics)


def _losses(curve: metrics.Metrics) -> list[float]:
    return [point["loss"] for point in curve.training]


@pytest.fixture(scope="module")
def job(parent: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """A run of 16 steps in fp32 on text that can be learned."""
    return tiny_job(tmp_path_factory.mktemp("job"), parent, steps=STEPS, learning_rate=5e-3, checkpoints=3)


@pytest.fixture(scope="module")
def cpu(job: TrainingJob, environment: dict[str, str], tmp_path_factory) -> Iterator[Any]:
    """The run on the CPU: a job and its launcher, which runs while the GPU trains."""
    on_cpu = replace(job, folder=tmp_path_factory.mktemp("cpu") / "run")
    process = _start(on_cpu, {**environment, **ON_CPU})
    yield on_cpu, process
    process.kill()


@pytest.fixture(scope="module")
def finished(job: TrainingJob, cpu: Any, environment: dict[str, str]) -> metrics.Metrics:
    """The run on the GPU without interruption."""
    return _curve(job, _start(job, environment))


def test_the_curve_in_fp32_is_that_of_the_cpu(job, cpu, finished, measured):
    expected = _losses(_curve(*cpu))
    apart = max(abs(one - other) for one, other in zip(_losses(finished), expected, strict=True))
    measured(f"losses {apart:.1e} apart in {STEPS} steps, from {expected[0]:.2f} to {expected[-1]:.2f}")
    assert len(expected) == STEPS
    assert expected[-1] < expected[0] - 0.5, "it does not learn"
    assert apart < 2e-3


def test_checkpoints_are_saved_while_training_goes_on(job, finished, measured):
    checkpoints = saved_checkpoints(job.checkpoints)
    assert checkpoints[0].name == f"step={STEPS - 1}-last"
    assert [damage(path) for path in checkpoints] == [None] * len(checkpoints)
    assert shape_of(open_source(str(checkpoints[0]))) == shape_of(open_source(str(job.initial)))
    measured(f"{len(checkpoints)} sound")


def test_a_signal_saves_and_the_same_command_goes_on(job, finished, environment, tmp_path, measured):
    job = replace(job, folder=tmp_path / "run")
    process = _start(job, environment)
    while process.poll() is None and not any(point["step"] >= 6 for point in metrics.read(job.metrics).training):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stopped = _curve(job, process, PREEMPTED).training[-1]["step"]
    assert 6 <= stopped < STEPS
    assert saved_checkpoints(job.checkpoints)[0].name == f"step={stopped - 1}-last"
    again = _losses(_curve(job, _start(job, environment)))
    assert job.log.read_text().count(f"step {stopped}/{STEPS}") == 1, "it did not go on where it stopped"
    apart = max(abs(one - other) for one, other in zip(again, _losses(finished), strict=True))
    measured(f"stopped at {stopped}, {apart:.1e} from the run without a stop")
    assert apart < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_other_precisions_are_near(job, finished, environment, tmp_path, request, measured, precision):
    if precision == "fp8":
        request.getfixturevalue("transformer_engine")
    near = replace(job, folder=tmp_path / "run", training=job.training.model_copy(update={"precision": precision}))
    curve = _curve(near, _start(near, environment))
    apart = max(abs(one - other) for one, other in zip(_losses(curve), _losses(finished), strict=True))
    peaks = [point["peak_gigabytes"] for point in curve.training if "peak_gigabytes" in point]
    measured(f"{apart:.1e} from fp32" + (f", {max(peaks):.2f} GB" if peaks else ""))
    assert 0 < apart < (0.05 if precision == "bf16" else 0.2)
    assert len(peaks) == (STEPS if environment.get("CUDA_VISIBLE_DEVICES") != "" else 0)


def test_pruned_weights_stay_zero(parent, device, environment, tmp_path, measured):
    tokens = TokenSet(random_ids(4, 32), {})
    method = Wanda(Sparsity.parse("2:4"))
    sparse = prune_layers(HuggingFaceSource(parent), tokens, method, tmp_path / "sparse", compute=Compute(device))
    job = tiny_job(tmp_path, sparse, steps=6, precision="bf16", mask_check_steps=1, checkpoints=1)
    curve = _curve(job, _start(job, environment))
    fractions = {point["zero_fraction"] for point in curve.sparsity}
    measured(f"zeros {fractions} in {len(curve.sparsity)} checks")
    assert fractions == {0.5}
    assert len(curve.sparsity) == 7
    matrices = list(matrix_sparsity(open_source(str(last_checkpoint(job)))))
    assert len(matrices) == 4 * 7
    assert all(2 * matrix.zeros == matrix.weights for matrix in matrices)


def test_a_student_that_begins_as_its_teacher_stays_near(parent, environment, tmp_path, measured):
    distill = Distillation(teacher=str(parent), hidden_weight=1.0, layer_pairs=((2, 2),))
    job = tiny_job(tmp_path, parent, steps=6, precision="bf16", checkpoints=1, distill=distill)
    job = replace(job, teacher=parent)
    curve = _curve(job, _start(job, environment))
    divergences = [point["kl"] for point in curve.training]
    measured(f"KL {divergences[0]:.1e} at first, {divergences[-1]:.1e} after 6 steps")
    assert abs(divergences[0]) < 1e-3
    assert divergences[-1] > divergences[0]


@pytest.fixture(scope="module")
def one_b(gpu: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """A model of 1.2 B parameters, 4 sequences of 8,192 tokens a step."""
    job = plain_job(tmp_path_factory.mktemp("one_b"), ONE_B, sequence_length=8192, batch=4, steps=10)
    return replace(job, training=job.training.model_copy(update={"checkpoints": 1}))  # of 17 GB


@pytest.fixture(scope="module")
def ours(one_b: TrainingJob, environment: dict[str, str]) -> list[dict[str, float]]:
    """The records of its steps, without the first ones."""
    return _curve(one_b, _start(one_b, environment)).training[3:]


def test_memory_and_speed_of_1_b(one_b, ours, measured):
    estimate = training_memory(ONE_B, one_b.layout, one_b.training).total / 1e9
    peak = max(point["peak_gigabytes"] for point in ours)
    pace = statistics.median(point["tokens_per_second"] for point in ours)
    mfu = [point["mfu"] for point in ours if "mfu" in point]
    share = f", MFU {statistics.median(mfu):.1%}" if mfu else ""
    measured(f"{pace:,.0f} tokens/s{share}, {peak:.1f} GB, estimated {estimate:.1f}")
    # Without Transformer Engine's fused kernels more is kept for the backward pass.
    assert peak == pytest.approx(estimate, rel=0.25 if has_transformer_engine() else 0.6)
    assert all(0.1 < value < 1 for value in mfu)


def test_1_b_compared_with_nemo_s_own_recipe(one_b, ours, transformer_engine, environment, tmp_path, measured):
    """NeMo's recipe has layers of Transformer Engine only."""
    answer = tmp_path / "steps.json"
    job = replace(one_b, folder=tmp_path / "run")
    job.folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.step", str(job.save()), "NeMo", str(answer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs: dict[str, Any] = json.loads(answer.read_text())
    seconds = job.training.tokens_per_step / statistics.median(point["tokens_per_second"] for point in ours)
    peak = max(point["peak_gigabytes"] for point in ours)
    measured(
        f"a step {seconds:.3f} s, NeMo's {theirs['seconds']:.3f} s; "
        f"{peak:.1f} GB, NeMo's {theirs['peak_bytes'] / 1e9:.1f} GB"
    )
    assert seconds < 1.1 * theirs["seconds"]
    assert peak < 1.1 * theirs["peak_bytes"] / 1e9
    assert torch.isfinite(torch.tensor(theirs["loss"]))
