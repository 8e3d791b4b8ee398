"""What the tests on a GPU share: the device, and a table of what they measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.system.gpu_environment import set_gpu_environment

set_gpu_environment()  # as every command does

DEVICE = os.environ.get("PVS_GPU_TEST_DEVICE", "cuda:0")
"""Where they run. ``cpu`` tries the tests themselves, on a machine without a GPU."""

_MEASURED = pytest.StashKey[str]()
_SECONDS = pytest.StashKey[float]()
_ROWS = pytest.StashKey[list[tuple[str, str, float, str]]]()


@pytest.fixture(scope="session")
def device() -> str:
    """The device; tests are skipped where there is none."""
    import torch

    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    return DEVICE


@pytest.fixture(scope="session")
def gpu(device: str) -> str:
    """The device of tests that say nothing on a CPU."""
    if not device.startswith("cuda"):
        pytest.skip("only a GPU shows this")
    return device


@pytest.fixture(scope="session")
def transformer_engine(gpu: str) -> None:
    """Transformer Engine, without which a test is skipped."""
    from nemo_pvs.training.machine import has_transformer_engine

    if not has_transformer_engine():
        pytest.skip("there is no Transformer Engine")


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    from tests.conftest import make_tiny_llama, save_tiny_tokenizer

    return save_tiny_tokenizer(make_tiny_llama(tmp_path_factory.mktemp("parent") / "model"))


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Set the text of the test's row in the table."""

    def say(text: str) -> None:
        request.node.stash[_MEASURED] = text

    return say


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    seconds = item.stash[_SECONDS] = item.stash.get(_SECONDS, 0.0) + call.duration  # with what it has set up
    if report.when == "call" or not report.passed:
        said = item.stash.get(_MEASURED, "")
        if report.skipped and isinstance(report.longrepr, tuple):
            said = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            said = call.excinfo.exconly().splitlines()[0] if call.excinfo else said
        item.config.stash[_ROWS].append((item.nodeid.split("::", 1)[-1], report.outcome, seconds, said))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, [])
    if rows:
        terminalreporter.section(f"on {_device_name()}")
        width = max(len(name) for name, *_ in rows)
        for name, outcome, seconds, said in rows:
            terminalreporter.write_line(f"{name:{width}}  {outcome:7}  {seconds:5.1f} s  {said}")


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name(DEVICE) if torch.cuda.is_available() else "a CPU"
