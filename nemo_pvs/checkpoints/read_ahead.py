"""Prefetching: the next tensor of a model is read in a thread while the current one is used."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nemo_pvs.checkpoints.source import WeightSource


class ReadAhead:
    """Reads a source's tensors in the order of ``names``; memory is the requested tensor and the next one.

    Reading waits for the disk, and slicing a pruned model takes CPU time: both overlap with the caller's checks,
    hashes and writes. A single thread makes all reads, one at a time, so a source need not be thread-safe.
    """

    def __init__(self, source: WeightSource, names: Iterable[str]) -> None:
        """Prepare to read; nothing is read before the first call of ``read``."""
        self._source = source
        order = list(names)
        self._following = dict(pairwise(order))
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._prefetched: tuple[str, Future[torch.Tensor]] | None = None

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor and start to read the next; a request out of order wastes the prefetched tensor.

        Raises:
            UserError: as the source's ``read``.
        """
        prefetched, self._prefetched = self._prefetched, None
        tensor = prefetched[1].result() if prefetched and prefetched[0] == name else self._begin(name).result()
        following = self._following.get(name)
        if following is not None:
            self._prefetched = following, self._begin(following)
        return tensor

    def _begin(self, name: str) -> Future[torch.Tensor]:
        return self._thread.submit(self._source.read, name)
