"""Move batches of hidden states to the device and back while it computes with others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch


class Transfers:
    """Transfers between the device and the host; states that are on the device, or on the CPU for it, stay there.

    Each direction has its own stream, so three things happen at the same time: the next batch arrives, the layer
    runs on the current one, and the outputs for the one before leave. Copies only overlap from and to page-locked
    memory; with other memory the results are the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def batches(self, states: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """Yield states [N, ...] on the device, ``size`` of N at a time; at the end all that was stored has arrived."""
        parts = states.split(size)
        if self._on_device(states):
            yield from parts
            return
        computing = torch.cuda.current_stream(self.device)
        started: deque[Any] = deque()
        try:
            coming = self._fetch(parts[0])
            for following in (*parts[1:], None):
                batch, arrival = coming
                if following is not None:
                    coming = self._fetch(following)
                computing.wait_event(arrival)
                batch.record_stream(computing)
                yield batch
                started.append(computing.record_event())
                if len(started) > 1:  # otherwise this process would run ahead and fill the device with batches
                    started.popleft().synchronize()
        finally:
            self.finish()

    def store(self, results: torch.Tensor, place: torch.Tensor) -> None:
        """Copy results from the device to where their batch is kept; ``finish`` waits for it."""
        if self._on_device(place):
            place.copy_(results)
            return
        self._leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._leaving):
            place.copy_(results, non_blocking=True)
        results.record_stream(self._leaving)

    def finish(self) -> None:
        """Wait until all results have been stored."""
        if "_leaving" in self.__dict__:
            self._leaving.synchronize()

    def _fetch(self, part: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Begin to copy a batch to the device; return it with the event of its arrival."""
        with torch.cuda.stream(self._arriving):
            return part.to(self.device, non_blocking=True), self._arriving.record_event()

    def _on_device(self, states: torch.Tensor) -> bool:
        return states.device == self.device

    @cached_property
    def _arriving(self) -> Any:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _leaving(self) -> Any:
        return torch.cuda.Stream(self.device)
