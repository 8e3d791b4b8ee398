from __future__ import annotations

import threading

import pytest
import torch

from nemo_pvs.checkpoints.read_ahead import ReadAhead
from nemo_pvs.errors import UserError

NAMES = ["a", "b", "c", "d"]


class Source:
    """Says who reads what; ``b`` can be held up, ``c`` is broken."""

    def __init__(self):
        self.reads = []
        self.threads = set()
        self.go_on = threading.Event()
        self.go_on.set()

    def read(self, name):
        self.threads.add(threading.get_ident())
        if name == "b":
            assert self.go_on.wait(timeout=30)
        self.reads.append(name)
        if name == "c":
            raise UserError("c is broken.")
        return torch.tensor(float(ord(name)))


def test_each_is_read_once_in_order_by_one_thread():
    source = Source()
    ahead = ReadAhead(source, ["a", "b", "d"])
    assert [chr(int(ahead.read(name))) for name in ("a", "b", "d")] == ["a", "b", "d"]
    assert source.reads == ["a", "b", "d"]
    assert len(source.threads) == 1
    assert threading.get_ident() not in source.threads


def test_the_next_is_read_while_the_last_is_used():
    source = Source()
    source.go_on.clear()
    ahead = ReadAhead(source, NAMES)
    assert ahead.read("a") == ord("a")  # handed out although b is still being read
    source.go_on.set()
    assert ahead.read("b") == ord("b")


def test_another_order_is_answered_too():
    source = Source()
    ahead = ReadAhead(source, NAMES)
    assert [chr(int(ahead.read(name))) for name in "dab"] == ["d", "a", "b"]
    assert chr(int(ahead.read("a"))) == "a"


def test_an_error_comes_with_its_own_tensor():
    ahead = ReadAhead(Source(), NAMES)
    ahead.read("a")
    ahead.read("b")  # c is tried now
    with pytest.raises(UserError, match="c is broken"):
        ahead.read("c")
    assert ahead.read("d") == ord("d")
