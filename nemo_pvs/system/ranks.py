"""Work shared by several ranks: each processes its part of the sequences, and results are summed.

Without ``torch.distributed`` there is one rank, and every function here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import distributed

from nemo_pvs.errors import UserError
from nemo_pvs.system.rendezvous import local_rank, ranks_joined


def world_size() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if _distributed() else 1


def rank() -> int:
    """Return this rank's number, from 0."""
    return distributed.get_rank() if _distributed() else 0


def is_main() -> bool:
    """Return whether this is the rank that writes files and prints."""
    return rank() == 0


Key = TypeVar("Key")
Result = TypeVar("Result")


def split(ids: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of the sequences [N, S]: a contiguous slice; shares differ by at most one sequence.

    Raises:
        UserError: there are fewer sequences than ranks.
    """
    if len(ids) < world_size():
        raise UserError(f"{len(ids)} sequences cannot be split over {world_size()} ranks; use more or fewer ranks.")
    return ids.tensor_split(world_size())[rank()]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over all ranks, in place, and return it; every rank gets the same bits."""
    if _distributed():
        distributed.all_reduce(tensor)
    return tensor


def merged(entries: dict[Key, Result]) -> dict[Key, Result]:
    """Return the entries of all ranks, on every rank; entries with the same key must be equal."""
    if world_size() == 1:
        return entries
    gathered: list[dict[Key, Result]] = [{}] * world_size()
    distributed.all_gather_object(gathered, entries)
    return {key: entry for part in gathered for key, entry in part.items()}


def barrier() -> None:
    """Wait until every rank has reached this point."""
    if _distributed():
        distributed.barrier()


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def joined(*, on_gpus: bool = False) -> Iterator[None]:
    """Join the ranks that torchrun or Slurm started for the duration of the block; do nothing if there is only one.

    Args:
        on_gpus: Also exchange tensors on GPUs, by NCCL, with one GPU per rank. Tensors on the CPU, such as statistics
            (a few megabytes per layer), are always exchanged by gloo, which every machine has.

    Raises:
        UserError: the variables that describe the ranks are inconsistent, or the other ranks do not appear in time.
    """
    gpus = on_gpus and torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(local_rank())
    with ranks_joined("cpu:gloo,cuda:nccl" if gpus else "gloo"):
        yield


@contextmanager
def held_by_main(lock: AbstractContextManager[None]) -> Iterator[None]:
    """Hold a lock for all ranks: the first rank acquires it, and the others wait for that.

    Raises:
        UserError: the first rank cannot acquire it; raised on every rank.
    """
    with ExitStack() as stack:
        refusal: list[str | None] = [None]
        if is_main():
            try:
                stack.enter_context(lock)
            except UserError as error:
                refusal = [str(error)]
        if world_size() > 1:
            distributed.broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise UserError(refusal[0])
        yield


def from_main(find: Callable[[], Result]) -> Result:
    """Call ``find`` on the first rank and return its result on every rank, because ranks may see different disks."""
    result: list[Result | None] = [find() if is_main() else None]
    if world_size() > 1:
        distributed.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]
