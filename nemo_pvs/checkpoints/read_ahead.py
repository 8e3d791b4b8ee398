"""Reading a model in a known order, the next tensor in a thread while the last one is used."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nemo_pvs.checkpoints.source import WeightSource


class ReadAhead:
    """Hands out a source's tensors in the order of ``names``; memory is the tensor asked for and the one after it.

    Reading waits for the disk, and slicing (of a pruned model) takes a processor: both go on while the caller checks,
    hashes and writes. All reads are done by one thread, one at a time, so a source need not know of it.
    """

    def __init__(self, source: WeightSource, names: Iterable[str]) -> None:
        """Prepare to read; nothing is read before the first tensor is asked for."""
        self._source = source
        order = list(names)
        self._following = dict(pairwise(order))
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._coming: tuple[str, Future[torch.Tensor]] | None = None

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, and begin to read the next; asking out of order costs a read in vain.

        Raises:
            UserError: what the source raises.
        """
        coming, self._coming = self._coming, None
        tensor = coming[1].result() if coming and coming[0] == name else self._begin(name).result()
        following = self._following.get(name)
        if following is not None:
            self._coming = following, self._begin(following)
        return tensor

    def _begin(self, name: str) -> Future[torch.Tensor]:
        return self._thread.submit(self._source.read, name)
