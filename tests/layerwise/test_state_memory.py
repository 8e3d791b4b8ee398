"""Hidden states go to the device while there is room, then to page-locked memory, then to ordinary memory."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.layerwise import state_memory
from nemo_pvs.layerwise.state_memory import DEFAULT_LIMIT, Room, StateMemory

DEVICE = torch.device("meta")  # stands for a GPU: tensors there are not on the CPU


@pytest.fixture
def pinned(monkeypatch):
    """Page-locked memory, which needs a GPU, by its address."""
    addresses = set()

    def page_locked(size, dtype):
        states = torch.empty(size, dtype=dtype)
        addresses.add(states.data_ptr())
        return states

    monkeypatch.setattr(state_memory, "_page_locked", page_locked)
    return addresses


def _bytes(memory: StateMemory, count: int) -> torch.Tensor:
    return memory.empty((count,), torch.uint8)


def test_the_place_is_the_fastest_that_has_room(pinned):
    memory = StateMemory(DEVICE, room=Room(device=1000, pinned=1024 + 512))
    first, second, third, fourth = (_bytes(memory, count) for count in (600, 600, 300, 600))
    assert (first.device, third.device) == (DEVICE, DEVICE)
    assert second.data_ptr() in pinned  # a block of 1,024 bytes, because PyTorch rounds up to a power of two
    assert fourth.device.type == "cpu"
    assert fourth.data_ptr() not in pinned
    assert _bytes(memory, 512).data_ptr() in pinned


def test_memory_is_free_again_with_the_last_view_of_it(pinned):
    memory = StateMemory(DEVICE, room=Room(device=1000, pinned=0))
    view = _bytes(memory, 1000).view(10, 100).split(3)[1]
    assert _bytes(memory, 1).device.type == "cpu"
    del view
    assert _bytes(memory, 1000).device == DEVICE


def test_a_limit_bounds_every_place(pinned):
    memory = StateMemory(DEVICE, limit=100, room=Room(device=1000, pinned=1000))
    assert memory.limit == 100
    assert _bytes(memory, 101).device.type == "cpu"
    assert _bytes(memory, 100).device == DEVICE


def test_without_a_limit_states_take_what_there_is_room_for():
    assert StateMemory(DEVICE, room=Room(device=1000, pinned=3000)).limit == 2500
    assert StateMemory(torch.device("cpu")).limit == DEFAULT_LIMIT


def test_memory_near_the_device_replaces_that_of_a_file_only_if_there_is_some(pinned):
    memory = StateMemory(DEVICE, room=Room(device=10, pinned=16))
    file = torch.arange(12, dtype=torch.uint8)
    assert (near := memory.near(file)).data_ptr() in pinned
    assert near.shape == file.shape
    assert memory.near(file) is file
    assert StateMemory(torch.device("cpu")).near(file) is file


def test_a_copy_is_placed_where_there_is_room_now(pinned):
    memory = StateMemory(DEVICE, room=Room(device=0, pinned=16))
    states = torch.arange(16, dtype=torch.uint8).view(4, 4)
    copies = [memory.copy(states) for _ in range(2)]
    assert [copy.data_ptr() in pinned for copy in copies] == [True, False]
    assert all(torch.equal(copy, states) for copy in copies)
