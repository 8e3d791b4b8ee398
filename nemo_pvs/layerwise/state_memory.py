"""Where hidden states are kept: on the device while they fit there, otherwise in the host's memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nemo_pvs.system import host_memory

DEFAULT_LIMIT = 8 << 30
"""Limit in bytes where none is given and layers run on the CPU."""


@dataclass(frozen=True)
class Room:
    """Bytes that hidden states may take."""

    device: int
    """On the device."""
    pinned: int
    """In page-locked memory of the host, from and to which copies run while the device computes."""

    @classmethod
    def here(cls, device: torch.device) -> Room:
        """Return half of what is free now: the rest is for layers, their activations and gradients, and for files.

        The ranks of this node get equal shares of the host's memory.
        """
        if device.type == "cpu":
            return cls(0, 0)
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by PyTorch
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(device=free // 2, pinned=host_memory.available() // 2 // ranks_here)


class StateMemory:
    """Memory for the hidden states of one model. With layers on the CPU it is ordinary memory."""

    def __init__(self, device: torch.device, limit: int | None = None, room: Room | None = None) -> None:
        """Measure the room.

        Args:
            device: Where layers run.
            limit: Bytes that states may take; None for as much as there is room for.
            room: The room; None measures it.
        """
        room = room or Room.here(device)
        self.device = device
        # PyTorch rounds a page-locked block up to a power of two, so up to half of that room may be lost.
        self.limit = limit or (DEFAULT_LIMIT if device.type == "cpu" else room.device + room.pinned // 2)
        self._left = room if limit is None else Room(min(room.device, limit), min(room.pinned, limit))

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialised memory: on the device, else page-locked, else pageable, which is slow to copy."""
        size = torch.Size(size)
        count = size.numel() * dtype.itemsize
        place = self._place(count)
        if place is None:
            return torch.empty(size, dtype=dtype)
        if place == "device":
            states, taken = torch.empty(size, dtype=dtype, device=self.device), Room(count, 0)
        else:
            states, taken = _page_locked(size, dtype), Room(0, _pinned_block(count))
        self._take(taken.device, taken.pinned)
        # The storage lives as long as any view of it.
        weakref.finalize(states.untyped_storage(), self._take, -taken.device, -taken.pinned)
        return states

    def copy(self, states: torch.Tensor) -> torch.Tensor:
        """Return a copy of states, wherever there is room for it now."""
        return self.empty(states.shape, states.dtype).copy_(states)

    def near(self, states: torch.Tensor) -> torch.Tensor:
        """Return uninitialised memory of the same size that is fast to copy; ``states`` itself if there is none.

        Args:
            states: Pageable memory, such as that of a mapped file.
        """
        return states if self._place(states.nbytes) is None else self.empty(states.shape, states.dtype)

    def _place(self, count: int) -> Literal["device", "pinned"] | None:
        if self.device.type == "cpu":
            return None
        if count <= self._left.device:
            return "device"
        return "pinned" if _pinned_block(count) <= self._left.pinned else None

    def _take(self, device: int, pinned: int) -> None:
        self._left = Room(self._left.device - device, self._left.pinned - pinned)


def _page_locked(size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, pin_memory=True)


def _pinned_block(count: int) -> int:
    """Return the bytes that PyTorch's allocator takes for a page-locked block of ``count`` bytes."""
    return 1 << max(0, count - 1).bit_length()
