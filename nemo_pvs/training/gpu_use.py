"""How well a training uses its GPUs: model FLOPs utilisation and peak memory. Imports no NeMo."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.planning.gpu_time import peak_flops
from nemo_pvs.training.job import TrainingJob


def flops_per_token(initial: Path, teacher: Path | None, sequence_length: int) -> int:
    """Return the model FLOPs that a training spends on a token: its own, and those of the teacher's forward pass.

    Args:
        initial: Checkpoint with the initial weights.
        teacher: Checkpoint of the teacher, if there is one.
        sequence_length: Tokens per sequence.
    """
    flops = shape_of(open_source(initial)).flops_per_token(sequence_length=sequence_length, training=True)
    if teacher is not None:
        flops += shape_of(open_source(teacher)).flops_per_token(sequence_length=sequence_length, training=False)
    return flops


def flops_of(job: TrainingJob) -> int | None:
    """Return ``flops_per_token`` of a job; None if its model becomes smaller during the training."""
    if job.pruning is not None:
        return None
    return flops_per_token(job.initial, None if job.cache else job.teacher, job.training.sequence_length)


def gpu_use(tokens_per_second: float, flops: int | None, gpus: int, precision: str) -> dict[str, float]:
    """Return ``mfu`` and ``peak_gigabytes`` of this rank's GPU for a record of a step; nothing without a GPU.

    Args:
        tokens_per_second: Speed of the step on all GPUs together.
        flops: Model FLOPs per token; None if unknown, and then there is no ``mfu``.
        gpus: Number of GPUs.
        precision: ``bf16``, ``fp8`` or ``fp32``.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    use = {"peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9}
    peak = peak_flops(torch.cuda.get_device_name(), precision)
    if flops is not None and peak is not None:
        use["mfu"] = tokens_per_second * flops / (gpus * peak)
    return use
