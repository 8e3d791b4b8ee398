"""Distillation on real NeMo and Megatron over gloo: the same curve on every layout, from a teacher that never changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.huggingface import HuggingFaceSource
from nemo_pvs.checkpoints.megatron import NemoSource, write_nemo
from nemo_pvs.checkpoints.torch_dist import TorchDistReader
from nemo_pvs.recipe import Layout, Training
from nemo_pvs.recipe_blocks import Distillation
from nemo_pvs.training import metrics
from nemo_pvs.training.distillation_loss import vocabulary_parallel_kl
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.run import last_checkpoint
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.masked_source import MaskedSource
from tests.parallel.ranks import run_ranks, write_tokens
from tests.parallel.test_training import _largest_difference, _losses
from tests.parallel.test_training import _train as train
from tests.state_source import as_transformers

pytestmark = pytest.mark.parallel

STEPS = 8
SEQUENCE = 32
SAMPLES = 8
TEACHER = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A distilled run of 8 steps in fp32; the teacher is wider and deeper, with its embeddings tied."""
    folder = tmp_path_factory.mktemp("job")
    make_tiny_llama(folder / "teacher", seed=5, initializer_range=0.1, tie_word_embeddings=True, **TEACHER)
    save_tiny_tokenizer(make_tiny_llama(folder / "model"))
    write_nemo(HuggingFaceSource(folder / "model"), folder / "initial")
    text = torch.randint(3, 128, (97,), generator=torch.Generator().manual_seed(0)).repeat(200).tolist()
    return TrainingJob(
        name="test",
        folder=folder / "run",
        initial=folder / "initial",
        data={
            "train": write_tokens(folder / "train", text),
            "validation": write_tokens(folder / "validation", text[: SAMPLES * SEQUENCE + 1]),
        },
        layout=Layout(),
        training=Training(
            tokens=STEPS * 8 * SEQUENCE,
            sequence_length=SEQUENCE,
            global_batch_size=8,
            micro_batch_size=2,
            learning_rate=3e-3,
            precision="fp32",
            validations=2,
            validation_samples=SAMPLES,
            checkpoints=2,
            distill=Distillation(teacher="elsewhere", temperature=2.0, top_k=50, lm_weight=0.25),
        ),
        teacher=folder / "teacher",
    )


def _run(job: TrainingJob, folder: Path, **layout: Any) -> metrics.Curve:
    job = replace(job, folder=folder, layout=Layout(**layout))
    folder.mkdir(exist_ok=True)
    run_ranks(job.layout.processes, train, job)
    return metrics.read(job.metrics)


def _with(job: TrainingJob, **distill: Any) -> TrainingJob:
    training = job.training.model_copy(update={"distill": Distillation(teacher="elsewhere", **distill)})
    return replace(job, training=training)


def _divergences(curve: metrics.Curve) -> list[float]:
    return [point["kl"] for point in curve.training]


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory) -> metrics.Curve:
    """The curve of one process."""
    curve = _run(job, tmp_path_factory.mktemp("reference"), distributed_optimizer=False)
    assert len(curve.training) == STEPS
    assert curve.training[-1]["kl"] < curve.training[0]["kl"] - 0.1, "it does not learn"
    return curve


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2},
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2},
        {"pipeline_parallel": 2, "virtual_pipeline": 2},
        {"data_parallel": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    ],
    ids=lambda layout: " ".join(f"{name}={value}" for name, value in layout.items()),
)
def test_every_layout_has_the_same_curve(job, reference, layout, tmp_path):
    curve = _run(job, tmp_path / "run", **layout)
    assert _largest_difference(_losses(curve), _losses(reference)) < 1e-3
    assert _largest_difference(_divergences(curve), _divergences(reference)) < 1e-3
    ours, theirs = ([point["loss"] for point in one.validation] for one in (curve, reference))
    assert _largest_difference(ours, theirs) < 1e-3
