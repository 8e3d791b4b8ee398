"""Keep lm-eval's tasks, their data and their metrics from the network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import huggingface_hub


class NetworkAccessError(Exception):
    """Something looked up a host. Not an OSError, because code that catches those would go on without its files."""


@contextmanager
def offline() -> Iterator[list[str]]:
    """Keep ``datasets`` from the network and from drawing progress bars, and let all other look-ups of hosts fail.

    Yields the list of hosts that were looked up, by whatever the block imports or calls; each raised
    ``NetworkAccessError``.
    """
    hosts: list[str] = []

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        hosts.append(str(host))
        raise NetworkAccessError(f"no network access to {host}")

    names: list[tuple[Any, str, Any]] = [
        (datasets.config, "HF_HUB_OFFLINE", True),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        (socket, "getaddrinfo", refuse),
    ]
    before = [getattr(owner, name) for owner, name, _ in names]
    bars = datasets.are_progress_bars_disabled()
    for owner, name, value in names:
        setattr(owner, name, value)
    datasets.disable_progress_bars()
    try:
        yield hosts
    finally:
        for (owner, name, _), value in zip(names, before, strict=True):
            setattr(owner, name, value)
        if not bars:
            datasets.enable_progress_bars()
