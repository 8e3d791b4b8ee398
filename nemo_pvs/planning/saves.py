"""Estimate what saving a checkpoint takes: memory of the nodes, and seconds that training waits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.memory import parameters_on
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training

_STATE = 12
"""Bytes per parameter of the optimizer's state in a checkpoint: the fp32 weight and two moments."""

# Assumed bytes per second; none of them has been measured on a cluster.
_TO_HOST = 10e9  # of one GPU, to pageable memory over PCIe 5
_NETWORK = 1e9  # of one rank that gathers from the others over gloo's TCP
_DISK = 1e9  # of one process that writes to a shared file system
RATES = (
    f"{_TO_HOST / 1e9:g} GB/s from a GPU to its host, {_NETWORK / 1e9:g} GB/s to a rank that gathers, "
    f"{_DISK / 1e9:g} GB/s from a rank to disk"
)
"""The assumptions, for people."""


@dataclass(frozen=True)
class Save:
    """What one save takes."""

    host: float
    """Bytes of host memory on the node that needs the most."""
    seconds: float
    """Until training, or the end of the job, can go on."""


def save_during_run(shape: Shape, layout: Parallelism, training: Training, gpus_per_node: int = 8) -> Save:
    """Estimate a save in the middle of a run, in which every rank saves its own part.

    The ranks that share a part of the model share its weights and optimizer state, which each copies to its host; the
    files are written while training goes on.
    """
    weights = 4 if training.precision == "fp32" else 2
    part = (weights + _STATE) * _largest_part(shape, layout) / _copies(layout)
    return Save(part * min(layout.processes, gpus_per_node), part / _TO_HOST)


def last_save(shape: Shape, layout: Parallelism, training: Training, gpus_per_node: int = 8) -> Save:
    """Estimate the save at the end of a run, or on a signal, which can be resumed in any layout.

    One rank of those that share a part of the model gathers its optimizer state, and the job ends only when the files
    are written.
    """
    during, copies = save_during_run(shape, layout, training, gpus_per_node), _copies(layout)
    if copies == 1 or not layout.distributed_optimizer:
        return Save(during.host, during.seconds + during.seconds * _TO_HOST / _DISK)
    state = _STATE * _largest_part(shape, layout)
    gathering = Counter(
        (tensor + pipeline_rank * layout.processes // layout.pipeline_parallel) // gpus_per_node
        for tensor in range(layout.tensor_parallel)
        for pipeline_rank in range(layout.pipeline_parallel)
    )
    gather = state * (1 - 1 / copies) / _NETWORK
    return Save(during.host + state * max(gathering.values()), during.seconds + gather + state / _DISK)


def _largest_part(shape: Shape, layout: Parallelism) -> float:
    return max(parameters_on(shape, layout, pipeline_rank) for pipeline_rank in range(layout.pipeline_parallel))


def _copies(layout: Parallelism) -> int:
    return layout.data_parallel * layout.context_parallel
