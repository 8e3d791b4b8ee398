"""The benchmark works; each test in a fresh interpreter, as ``measure`` forks and pytest is large and has threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.source import shape_of
from tests.benchmarks.conversion import SHAPES, benchmark, half_width, rounds_of_writers
from tests.benchmarks.measure import Measured, measure


def _in_a_small_process(check: Callable[..., None], *arguments: Path) -> None:
    call = f"from {__name__} import {check.__name__} as check; check(*map(Path, {[*map(str, arguments)]}))"
    command = [sys.executable, "-W", "ignore", "-c", f"from pathlib import Path; {call}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_benchmark_runs_and_leaves_its_input(tmp_path):
    _in_a_small_process(check_the_benchmark, tmp_path)


def check_the_benchmark(tmp_path):
    results = benchmark(SHAPES["tiny"], tmp_path, Console(quiet=True))
    assert len(results) == 13
    assert all(0 < measured.seconds < 60 and measured.peak >= measured.baseline for measured in results.values())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert shape_of(HuggingFaceSource(tmp_path / "hf")) == SHAPES["tiny"]
    rounds = rounds_of_writers(SHAPES["tiny"], tmp_path, 2, Console(quiet=True))
    labels, seconds, ratios = (list(rounds.columns[column].cells) for column in range(3))
    assert [label.split()[-1] for label in labels] == ["folder", "Megatron", "bf16", "q8_0"]
    assert all(len(cell.split(", ")) == 2 for cell in seconds)
    assert ratios[0] == "1.00"


def test_half_of_8b_is_4b():
    target = half_width(SHAPES["llama31_8b"]).target
    assert (target.hidden, target.ffn, target.kv_groups) == (3072, 9216, 8)
    assert 3.9e9 < target.parameters < 4.8e9


@pytest.mark.slow
def test_memory_is_counted_from_before_the_work():
    _in_a_small_process(check_the_baseline)


def check_the_baseline():
    def work():
        return len(bytearray(b"x" * 50_000_000))

    measured = measure(work)
    assert isinstance(measured, Measured)
    assert 90e6 < measured.peak - measured.baseline < 130e6  # the bytes and their copy


@pytest.mark.slow
def test_memory_is_a_few_tensors_of_many(tmp_path):
    _in_a_small_process(check_the_memory, tmp_path)


def check_the_memory(tmp_path):
    """The largest tensor has 34 MB and all together 570 MB."""
    shape = SHAPES["tiny"].replace(layers=15, hidden=1024, ffn=4096, heads=64, kv_groups=16, vocab=16384)
    constant = 300_000_000  # blocks of two files, 64 MB, and what the allocator keeps of small tensors
    for label, measured in benchmark(shape, tmp_path, Console(quiet=True)).items():
        if not label.startswith("cp"):
            needed = measured.peak - measured.baseline
            assert needed < 3 * 33_600_000 + constant, f"{label}: {needed / 1e6:.0f} MB"
