"""What a teacher costs: steps of a distilled run beside those of a plain one, in NeMo and Megatron.

    python -m tests.benchmarks.distillation [--hidden 384] [--layers 4] [--vocab 4096] [--steps 16]

The student has half of the teacher's layers. What a step should take more follows from the FLOPs of the teacher's
forward pass; what it takes beyond that is the divergence itself and, with pipeline stages, their bubble.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nemo_pvs.checkpoints.huggingface import HuggingFaceSource
from nemo_pvs.checkpoints.megatron import write_nemo
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.progress import console
from nemo_pvs.recipe import Layout, Training
from nemo_pvs.recipe_blocks import Distillation
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.parallel.ranks import run_ranks, write_tokens

_SEQUENCE = 128
_SAMPLES = 8
_WARM_UP = 4
_LAYOUTS = {"one process": {}, "TP=2": {"tensor_parallel": 2}, "PP=2": {"pipeline_parallel": 2}}
_LOSSES: dict[str, dict[str, Any]] = {"all tokens": {}, "top 100": {"top_k": 100}}


@dataclass(frozen=True)
class Cost:
    plain_seconds: float
    """Median of a step on the text alone."""
    distilled_seconds: float
    """Median of one with a teacher."""


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--hidden", type=int, default=384)
    options.add_argument("--layers", type=int, default=4, help="of the teacher, a multiple of 4")
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--steps", type=int, default=16)
    given = options.parse_args()
    table = Table("layout", "divergence from", "plain (ms)", "distilled (ms)", "ratio", "by FLOPs")
    with tempfile.TemporaryDirectory() as folder:
        job = distilled_job(Path(folder), given.hidden, given.layers, given.vocab, given.steps)
        for layout, sizes in _LAYOUTS.items():
            for loss, settings in _LOSSES.items():
                if settings and sizes:
                    continue  # what the top tokens cost does not depend on the layout
                cost = measure(job, Layout(**sizes), Distillation(teacher="elsewhere", **settings))
                plain, distilled = cost.plain_seconds, cost.distilled_seconds
                times = (f"{plain * 1e3:,.0f}", f"{distilled * 1e3:,.0f}", f"{distilled / plain:.2f}")
                table.add_row(layout, loss, *times, f"{flops_ratio(job):.2f}")
    console.print(table)


def distilled_job(folder: Path, hidden: int, layers: int, vocab: int, steps: int) -> TrainingJob:
    """Return a run in fp32 whose teacher has twice the student's layers."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": vocab,
    }
    make_tiny_llama(folder / "teacher", num_hidden_layers=layers, **sizes)
    student = save_tiny_tokenizer(make_tiny_llama(folder / "student", num_hidden_layers=layers // 2, **sizes), vocab)
    write_nemo(HuggingFaceSource(student), folder / "initial")
    tokens = steps * _SAMPLES * _SEQUENCE
    text = torch.randint(3, vocab, (tokens + _SEQUENCE + 1,)).tolist()
    return TrainingJob(
        name="benchmark",
        folder=folder,
        initial=folder / "initial",
        data={
            "train": write_tokens(folder / "train", text),
            "validation": write_tokens(folder / "validation", text[: _SAMPLES * _SEQUENCE + 1]),
        },
        layout=Layout(),
        training=Training(
            tokens=tokens,
            sequence_length=_SEQUENCE,
            global_batch_size=_SAMPLES,
            micro_batch_size=2,
            learning_rate=1e-4,
            precision="fp32",
            validations=1,
            validation_samples=_SAMPLES,
            checkpoints=1,
        ),
        teacher=folder / "teacher",
    )


def measure(job: TrainingJob, layout: Layout, distill: Distillation) -> Cost:
    """Train with and without the teacher, one after the other."""
    trainings = (job.training.model_copy(update={"distill": how}) for how in (None, distill))
    return Cost(*(seconds_of_a_step(replace(job, layout=layout, training=training)) for training in trainings))


def flops_ratio(job: TrainingJob) -> float:
    """Return what a distilled step takes of a plain one's FLOPs."""
    assert job.teacher is not None
    student, teacher = (shape_of(HuggingFaceSource(folder)) for folder in (job.folder / "student", job.teacher))
    plain = student.flops_per_token(sequence_length=_SEQUENCE, training=True)
    return 1 + teacher.flops_per_token(sequence_length=_SEQUENCE, training=False) / plain


def seconds_of_a_step(job: TrainingJob) -> float:
    """Train in a folder of its own, and return the median of a step."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        run = replace(job, folder=Path(folder))
        run_ranks(run.layout.processes, _train, run)
        steps = metrics.read(run.metrics).training[_WARM_UP:]
        return statistics.median(run.training.tokens_per_step / step["tokens_per_second"] for step in steps)


def _train(job: TrainingJob) -> None:
    import os

    from nemo_pvs.training.train import train_on_cpu

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train_on_cpu(job)


if __name__ == "__main__":
    main()
