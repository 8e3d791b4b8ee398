from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from nemo_pvs.system import processes


def test_a_swallowed_interrupt_comes_again(monkeypatch):
    monkeypatch.setattr(processes, "_SECONDS_TO_CLEAN_UP", 0.05)
    with pytest.raises(KeyboardInterrupt), processes.heeding_interrupts():
        _swallow_an_interrupt_and_work_on()


def test_handlers_and_timer_are_gone_afterwards(monkeypatch):
    monkeypatch.setattr(processes, "_SECONDS_TO_CLEAN_UP", 0.05)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt), processes.heeding_interrupts():
        _interrupt_myself()
    time.sleep(0.1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) == before


def _interrupt_myself():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def _swallow_an_interrupt_and_work_on():
    with contextlib.suppress(BaseException):  # what some libraries do around an optional import
        _interrupt_myself()
    time.sleep(10)
