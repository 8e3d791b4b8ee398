"""What pruning that trains costs a step on Megatron: masks, units that are watched or go, a teacher.

    python -m tests.benchmarks.step_costs [--hidden 384] [--layers 4] [--vocab 4096] [--steps 16]

All steps are of one model, on one text; Taylor importance is no training, and its row is the time for a step's tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.sheared import MaskLearning
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.progress import console
from nemo_pvs.training import metrics
from nemo_pvs.training.job import LearnedMasks, TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.ranks import run_ranks, write_tokens

SEQUENCE = 128
SAMPLES = 8
WARM_UP = 4
LAYOUTS = {"one process": {}, "TP=2": {"tensor_parallel": 2}, "PP=2": {"pipeline_parallel": 2}}
TAYLOR = "Taylor importance"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--hidden", type=int, default=384)
    options.add_argument("--layers", type=int, default=4, help="a multiple of 2; the teacher has twice as many")
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--steps", type=int, default=16)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), given.hidden, 2 * given.layers, given.vocab, given.steps)
        table = Table("a step of ...", *(f"{layout} (ms)" for layout in LAYOUTS), *("ratio" for _ in LAYOUTS))
        plain: list[float] = []
        for kind in [*KINDS, TAYLOR]:
            seconds = [measure(kind, replace(job, layout=Parallelism(**sizes))) for sizes in LAYOUTS.values()]
            plain = plain or seconds
            ratios = (f"{one / other:.2f}" for one, other in zip(seconds, plain, strict=True))
            table.add_row(kind, *(f"{one * 1e3:,.0f}" for one in seconds), *ratios)
        console.print(table)
        console.print(f"by FLOPs a distilled step is {flops_ratio(job):.2f} of a plain one")


def make_job(folder: Path, hidden: int, layers: int, vocab: int, steps: int) -> TrainingJob:
    """Return a run in fp32 with a teacher beside it that has twice the layers."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": vocab,
    }
    teacher, student = {**sizes, "num_hidden_layers": layers}, {**sizes, "num_hidden_layers": layers // 2}
    return make_run(folder, teacher, student, steps)


def make_run(
    folder: Path, teacher: dict[str, Any], student: dict[str, Any], steps: int, samples: int = SAMPLES
) -> TrainingJob:
    """Return a run in fp32 on random text; models have random weights and the given values of their config."""
    vocab = student["vocab_size"]
    make_tiny_llama(folder / "teacher", **teacher)
    save_tiny_tokenizer(make_tiny_llama(folder / "student", **student), vocab)
    write_nemo(HuggingFaceSource(folder / "student"), folder / "initial")
    tokens = steps * samples * SEQUENCE
    text = torch.randint(3, vocab, (tokens + SEQUENCE + 1,)).tolist()
    return TrainingJob(
        name="benchmark",
        folder=folder,
        initial=folder / "initial",
        data={
            "train": write_tokens(folder / "train", text),
            "validation": write_tokens(folder / "validation", text[: samples * SEQUENCE + 1]),
        },
        layout=Parallelism(),
        training=Training(
            tokens=tokens,
            sequence_length=SEQUENCE,
            global_batch_size=samples,
            micro_batch_size=2,
            learning_rate=1e-4,
            precision="fp32",
            validations=1,
            validation_samples=samples,
            checkpoints=1,
        ),
        teacher=folder / "teacher",
    )


def measure(kind: str, job: TrainingJob) -> float:
    """Return the median seconds of a step; with Taylor importance, of as many sequences."""
    processes = job.layout.processes
    if kind == TAYLOR:
        return max(run_ranks(processes, _taylor_rank, job))
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        run = replace(KINDS[kind](job), folder=Path(folder))
        run.save()
        run_ranks(processes, _train_rank, run)
        steps = metrics.read(run.metrics).training[WARM_UP:-1]  # the last one is not everybody's kind of step
        return statistics.median(run.training.tokens_per_step / step["tokens_per_second"] for step in steps)


def flops_ratio(job: TrainingJob) -> float:
    """Return what a distilled step takes of a plain one's FLOPs."""
    assert job.teacher is not None
    student, teacher = (shape_of(HuggingFaceSource(folder)) for folder in (job.folder / "student", job.teacher))
    plain = student.flops_per_token(sequence_length=SEQUENCE, training=True)
    return 1 + teacher.flops_per_token(sequence_length=SEQUENCE, training=False) / plain


def _plain(job: TrainingJob) -> TrainingJob:
    return replace(job, teacher=None)


def _distilled(top_k: int | None = None) -> Callable[[TrainingJob], TrainingJob]:
    def kind(job: TrainingJob) -> TrainingJob:
        distill = Distillation(teacher="elsewhere", top_k=top_k)
        return replace(job, training=job.training.model_copy(update={"distill": distill}))

    return kind


def _compared(job: TrainingJob) -> TrainingJob:
    """Learn from logits, the embedding and every layer, each from the teacher's at the same share of its depth."""
    layers = shape_of(NemoSource(job.initial)).layers
    pairs = tuple((layer, 2 * layer) for layer in range(1, layers + 1))
    distill = Distillation(teacher="elsewhere", layer_pairs=pairs, hidden_weight=1.0, embedding_weight=1.0)
    return replace(job, training=job.training.model_copy(update={"distill": distill}))


def _masked(job: TrainingJob) -> TrainingJob:
    """Learn masks of every kind of unit."""
    shape = shape_of(NemoSource(job.initial))
    target = shape.replace(
        hidden=shape.hidden // 2, ffn=shape.ffn // 2, kv_groups=shape.kv_groups - 1, layers=shape.layers - 1
    )
    return replace(_plain(job), masks=LearnedMasks(target, MaskLearning()))


def _watched(job: TrainingJob) -> TrainingJob:
    return _pruned(job, removals=1)


def _removed(**settings: Any) -> Callable[[TrainingJob], TrainingJob]:
    def kind(job: TrainingJob) -> TrainingJob:
        return _pruned(job, removals=job.training.steps, **settings)

    return kind


def _pruned(job: TrainingJob, removals: int, **settings: Any) -> TrainingJob:
    """Let FFN channels go in the last so many steps, one of a layer in each, or ``uniform``: one of every layer."""
    shape, training = shape_of(NemoSource(job.initial)), job.training
    each = 3 * shape.hidden * (shape.layers if settings.setdefault("uniform", False) else 1)
    pruning = PruningAware(
        parameters=shape.parameters - removals * each,
        tokens=training.tokens,
        start_tokens=(training.steps - removals) * training.tokens_per_step,
        least_hidden=shape.hidden,
        least_groups=shape.kv_groups,
        **settings,
    )
    return replace(_plain(job), pruning=pruning)


KINDS: dict[str, Callable[[TrainingJob], TrainingJob]] = {
    "plain training": _plain,
    "distillation, a teacher twice as deep": _distilled(),
    "... by its 100 likeliest tokens": _distilled(top_k=100),
    "... by hidden states of every layer, too": _compared,
    "Sheared LLaMA: masks are learned": _masked,
    "EfficientLLM: units are watched": _watched,
    "... and an FFN channel of a layer goes": _removed(compensate=False),
    "... and the rest of it makes up for that": _removed(),
    "... one of every layer, made up for": _removed(uniform=True),
}


def _train_rank(job: TrainingJob) -> None:
    import os

    from nemo_pvs.megatron.rank import train_on_cpu

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train_on_cpu(job)


def _taylor_rank(job: TrainingJob) -> float:
    """Be a rank; return the seconds of as many sequences as a step has."""
    from nemo_pvs.data.token_set import TokenSet
    from nemo_pvs.megatron.gradients import megatron_taylor_scores
    from nemo_pvs.megatron.inference import megatron_ranks
    from nemo_pvs.system.ranks import joined

    source, times = NemoSource(job.initial), []
    ids = torch.randint(3, shape_of(source).vocab, (WARM_UP + SAMPLES, SEQUENCE))
    with joined(on_gpus=True), megatron_ranks(job.layout.tensor_parallel, job.layout.pipeline_parallel):
        megatron_taylor_scores(source, TokenSet(ids, {}), progress=lambda *_: times.append(time.perf_counter()))
    return times[-1] - times[WARM_UP - 1]


if __name__ == "__main__":
    main()
