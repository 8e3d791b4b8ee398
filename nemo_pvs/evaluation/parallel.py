"""The ranks of an evaluation, as torchrun started them; alone, nothing here does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed

from nemo_pvs.system import ranks
from nemo_pvs.system.rendezvous import local_rank, ranks_joined

Found = TypeVar("Found")


@contextmanager
def joined() -> Iterator[None]:
    """Join the ranks for the length of the block: gloo for what is on the CPU, NCCL for what is on GPUs.

    Raises:
        UserError: the variables that describe the ranks make no sense, or the other ranks do not come.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    with ranks_joined("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"):
        yield


def from_main(find: Callable[[], Found]) -> Found:
    """Return what the first rank finds, on every rank: they might see different disks, and must not disagree."""
    found: list[Found | None] = [find() if ranks.is_main() else None]
    if ranks.world_size() > 1:
        distributed.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]
