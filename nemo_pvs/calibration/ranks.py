"""Calibration on several ranks: each reads its share of the sequences, and sums are added up.

Without ``torch.distributed`` there is one rank, and every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from nemo_pvs.errors import UserError


def world_size() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if _distributed() else 1


def rank() -> int:
    """Return this rank's number, from 0."""
    return distributed.get_rank() if _distributed() else 0


def is_main() -> bool:
    """Return whether this is the rank that writes files and talks."""
    return rank() == 0


def split(ids: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of the sequences [N, S]: neighbours, and at most one more than another rank has.

    Raises:
        UserError: there are fewer sequences than ranks.
    """
    if len(ids) < world_size():
        raise UserError(f"{len(ids)} sequences cannot be split over {world_size()} ranks; take more or fewer ranks.")
    return ids.tensor_split(world_size())[rank()]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over all ranks, in place, and return it; every rank gets the same bits."""
    if _distributed():
        distributed.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank is here."""
    if _distributed():
        distributed.barrier()


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that torchrun (or Slurm through it) started, for the length of the block; alone, do nothing.

    Statistics are summed over gloo, which every machine has; they are a few megabytes a layer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _distributed():
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()
