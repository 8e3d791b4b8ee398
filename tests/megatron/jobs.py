"""A short training run of a tiny model, for tests that choose what is special about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training.job import TrainingJob
from tests.megatron.ranks import write_tokens

SEQUENCE = 32
VALIDATION_SAMPLES = 8


def accumulating(job: TrainingJob) -> TrainingJob:
    """Return the job with micro batches of a size at which every rank adds up the gradients of two.

    More of them prove no more, and under tensor parallelism most of the time goes into the messages of each.
    """
    size = job.training.global_batch_size // (2 * job.layout.data_parallel)
    return replace(job, training=job.training.model_copy(update={"micro_batch_size": size}))


def tiny_job(
    folder: Path, initial: Path | WeightSource, *, steps: int, text: list[int] | None = None, **training: Any
) -> TrainingJob:
    """Return a run in fp32 on one rank, its initial weights and its text written into ``folder``.

    Args:
        folder: Where all of it goes.
        initial: A Hugging Face folder, or any source.
        steps: Optimizer steps.
        text: Token ids; by default 97 random ones over and over, which can be learned.
        **training: Fields of ``Training`` other than the usual: batches of 8 in twos, a peak of 3e-3.
    """
    write_nemo(HuggingFaceSource(initial) if isinstance(initial, Path) else initial, folder / "initial")
    if text is None:
        text = torch.randint(3, 128, (97,), generator=torch.Generator().manual_seed(0)).repeat(200).tolist()
    settings: dict[str, Any] = {
        "sequence_length": SEQUENCE,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "validations": 2,
        "validation_samples": VALIDATION_SAMPLES,
        "checkpoints": 2,
        **training,
    }
    sequence = settings["sequence_length"]
    return TrainingJob(
        name="test",
        folder=folder / "run",
        initial=folder / "initial",
        data={
            "train": write_tokens(folder / "train", text),
            "validation": write_tokens(folder / "validation", text[: settings["validation_samples"] * sequence + 1]),
        },
        layout=Parallelism(),
        training=Training(tokens=steps * settings["global_batch_size"] * sequence, **settings),
    )
