"""CUDA's streams at their worst: every copy happens as late as it may, and nobody waits who does not ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from nemo_pvs.layerwise.transfers import Transfers


@dataclass
class Stream:
    """Copies that are due, in order."""

    device: Any = None
    due: list[Callable[[], Any]] = field(default_factory=list)

    def synchronize(self) -> None:
        while self.due:
            self.due.pop(0)()

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        event.stream.synchronize()

    def wait_stream(self, other: Stream) -> None:
        other.synchronize()


@dataclass
class Event:
    stream: Stream

    def synchronize(self) -> None:
        self.stream.synchronize()


@dataclass
class Imitation:
    """What was seen of an imitated GPU."""

    copies: int = 0
    """Asynchronous copies so far, to the device and back."""
    on_their_way: list[torch.Tensor] = field(default_factory=list)
    """Tensors of the device in asynchronous copies; PyTorch may reuse their memory unless a stream records them."""
    recorded: list[torch.Tensor] = field(default_factory=list)

    def check(self) -> None:
        assert self.copies
        recorded = {tensor.data_ptr() for tensor in self.recorded}
        assert all(tensor.data_ptr() in recorded for tensor in self.on_their_way)


def imitate_gpu(monkeypatch: pytest.MonkeyPatch) -> Imitation:
    """Have states of models on the CPU streamed as if the CPU were a device without room for them."""
    seen, active, computing = Imitation(), list[Stream](), Stream()
    copy, to = torch.Tensor.copy_, torch.Tensor.to

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        active.append(chosen)
        yield
        active.pop()

    def late_to(tensor: torch.Tensor, *arguments: Any, non_blocking: bool = False, **named: Any) -> torch.Tensor:
        if not (active and non_blocking):
            return to(tensor, *arguments, **named)
        arriving = torch.full_like(tensor, torch.nan)
        active[-1].due.append(lambda: copy(arriving, tensor))
        seen.copies += 1
        seen.on_their_way.append(arriving)
        return arriving

    def late_copy(place: torch.Tensor, results: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not (active and non_blocking):
            return copy(place, results)
        active[-1].due.append(lambda: copy(place, results))
        seen.copies += 1
        seen.on_their_way.append(results)
        return place

    monkeypatch.setattr(Transfers, "_on_device", lambda *_: False)
    monkeypatch.setattr(torch.Tensor, "to", late_to)
    monkeypatch.setattr(torch.Tensor, "copy_", late_copy)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: seen.recorded.append(tensor))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: computing)
    return seen
