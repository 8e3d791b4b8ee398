"""Joins the ranks that torchrun, Slurm or Kubernetes started, found through environment variables, with a timeout.

PyTorch is imported only where it is needed, because importing it takes seconds and the launcher reads the environment
first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.system.progress import console

_SECONDS = "PVS_RENDEZVOUS_SECONDS"
_SECONDS_TO_MEET = 300
STANDALONE = ("--standalone", "--local-addr=127.0.0.1")
"""Options of torchrun for ranks on this machine only. By default they meet at its full host name, which the network of
a workstation may not resolve, or resolve to another machine or an address that is not reachable."""
_REMEDY = "unset WORLD_SIZE to work alone, or start the ranks with torchrun"


@dataclass(frozen=True)
class RankEnvironment:
    """The rank that torchrun's environment variables describe."""

    rank: int
    size: int
    """Number of ranks."""
    address: str
    """Host and port where the ranks meet."""


def rank_environment() -> RankEnvironment | None:
    """Read this rank from the environment; None if it is the only one.

    Raises:
        UserError: a variable is missing or has an invalid value.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    size = _number(text)
    if size is None or size < 1:
        raise UserError(f"The variable WORLD_SIZE is {text!r}, not a number of processes; {_REMEDY}.")
    if size == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"The variable WORLD_SIZE is {size}, but these are not set: {', '.join(missing)}, without which the other "
            f"processes cannot be found; {_REMEDY}."
        )
    for name, end in (("RANK", size), ("MASTER_PORT", 65536), ("LOCAL_RANK", size), ("LOCAL_WORLD_SIZE", size + 1)):
        value = os.environ.get(name)
        if value is not None and (_number(value) is None or int(value) >= end):
            raise UserError(
                f"The variable {name} is {value!r}, not a number below {end}, where WORLD_SIZE is {size}; {_REMEDY}."
            )
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return RankEnvironment(int(os.environ["RANK"]), size, address)


def local_rank() -> int:
    """Return the number of this rank on its machine."""
    return _number(os.environ.get("LOCAL_RANK", "0")) or 0


@contextmanager
def ranks_joined(backend: str) -> Iterator[None]:
    """Join the ranks that the environment describes for the duration of the block.

    Do nothing if there is only one rank or if the ranks are joined already.

    Args:
        backend: As for ``init_process_group``.

    Raises:
        UserError: the environment is inconsistent, or the other ranks do not appear in time.
    """
    from torch import distributed

    environment = rank_environment()
    if environment is None or distributed.is_initialized():
        yield
        return
    distributed.init_process_group(
        backend, store=_meet(environment), rank=environment.rank, world_size=environment.size
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _meet(environment: RankEnvironment) -> Any:
    """Wait for all ranks and return the store that they share."""
    from torch.distributed.constants import default_pg_timeout
    from torch.distributed.rendezvous import rendezvous

    seconds = _seconds_to_meet()
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun starts all ranks and notices when one ends
        console.print(
            f"rank {environment.rank} of {environment.size} (RANK and WORLD_SIZE): waiting up to {seconds} s for the "
            f"others at {environment.address}",
            soft_wrap=True,
        )
    try:
        meeting = rendezvous("env://", environment.rank, environment.size, timeout=timedelta(seconds=seconds))
        store, _, _ = next(iter(meeting))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Rank {environment.rank} of {environment.size} (RANK and WORLD_SIZE) did not find the others at "
            f"{environment.address} (MASTER_ADDR and MASTER_PORT) within {seconds} s ({reason}); {_REMEDY}, or set "
            f"{_SECONDS} to wait longer."
        ) from None
    store.set_timeout(default_pg_timeout)
    return store


def _seconds_to_meet() -> int:
    text = os.environ.get(_SECONDS, str(_SECONDS_TO_MEET))
    seconds = _number(text)
    if not seconds:
        raise UserError(f"The variable {_SECONDS} is {text!r}; give a whole number of seconds, 1 or more.")
    return seconds


def _number(text: str) -> int | None:
    """Parse a whole number of 0 or more; None if the text is something else."""
    return int(text) if text.isascii() and text.isdecimal() else None
