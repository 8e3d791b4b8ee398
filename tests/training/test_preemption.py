import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from nemo_pvs.training.preemption import children, handing_on, send_to_each


def test_a_signal_is_handed_on_and_noted_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    sent = []
    with handing_on(sent.append) as came:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert sent == came == [signal.SIGTERM, signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_signals_alone():
    """As a server does that trains in a thread; only the main thread may handle signals."""
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with handing_on(print) as came:
            return came, signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == ([], before)


def test_children_get_a_signal_that_their_parent_does_not():
    """As under torchrun, whose agent must live on while its workers save."""
    code = "import subprocess, sys; sys.exit(subprocess.run(['sleep', '60']).returncode == -10)"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        deadline = time.monotonic() + 20
        while not (workers := children(parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(workers) == 1
        send_to_each([*workers, 2**22 - 3], signal.SIGUSR1)  # the other one has ended
        assert parent.wait(20) == 1
