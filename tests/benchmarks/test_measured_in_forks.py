"""Benchmarks of conversion, checksums and calibration; ``measure`` forks, and pytest is large and has threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.source import shape_of
from tests.benchmarks.conversion import SHAPES, benchmark, half_width, rounds_of_writers
from tests.benchmarks.measure import Measured, measure
from tests.benchmarks.methods import METHODS
from tests.forked_commands import ForkedCommands, forked_commands


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedCommands]:
    """Run Python in a process that has imported what the benchmarks do, and has no threads."""
    modules = [f"tests.benchmarks.{name}" for name in ("calibration_8b", "checksums", "test_measured_in_forks")]
    outputs = tmp_path_factory.mktemp("small") / "outputs"
    with forked_commands(outputs, *modules, cwd=Path(__file__).parents[2]) as run:
        yield run


def _passes(small: ForkedCommands, check: Callable[..., None], *arguments: Path) -> None:
    call = f"from {__name__} import {check.__name__} as check; check(*map(Path, {[*map(str, arguments)]}))"
    done = small("-c", f"from pathlib import Path; {call}")
    assert done.code == 0, done.errors[-2000:]


@pytest.mark.slow
def test_checksums_are_measured(small, tmp_path):
    done = small("-m", "tests.benchmarks.checksums", "--shape", "tiny", "--rounds", 1, "--folder", tmp_path)
    assert done.code == 0, done.errors[-2000:]
    assert "fingerprint, no manifest, again" in done.output


@pytest.mark.slow
def test_calibration_of_every_method_is_measured(small, tmp_path):
    done = small("-m", "tests.benchmarks.calibration_8b", "--shape", "tiny", "--folder", tmp_path)
    assert done.code == 0, done.errors[-2000:]
    assert set(re.findall(r"^(\S+): [\d.]+ s$", done.output, re.MULTILINE)) == {"calibrate", *METHODS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-4-layers", "scores"]


def test_half_of_8b_is_4b():
    target = half_width(SHAPES["llama31_8b"]).target
    assert (target.hidden, target.ffn, target.kv_groups) == (3072, 9216, 8)
    assert 3.9e9 < target.parameters < 4.8e9


@pytest.mark.slow
def test_memory_is_counted_from_before_the_work(small):
    _passes(small, check_the_baseline)


def check_the_baseline():
    def work():
        return len(bytearray(b"x" * 50_000_000))

    measured = measure(work)
    assert isinstance(measured, Measured)
    assert 90e6 < measured.peak - measured.baseline < 130e6  # the bytes and their copy


@pytest.mark.slow
def test_conversion_takes_the_memory_of_a_few_tensors_and_leaves_its_input(small, tmp_path):
    _passes(small, check_the_benchmark, tmp_path)


def check_the_benchmark(tmp_path):
    """The largest tensor has 34 MB and all together 570 MB."""
    shape = SHAPES["tiny"].replace(layers=15, hidden=1024, ffn=4096, heads=64, kv_groups=16, vocab=16384)
    results = benchmark(shape, tmp_path, Console(quiet=True))
    assert len(results) == 13
    assert all(0 < measured.seconds < 60 and measured.peak >= measured.baseline for measured in results.values())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert shape_of(HuggingFaceSource(tmp_path / "hf")) == shape
    constant = 300_000_000  # blocks of two files, 64 MB, and what the allocator keeps of small tensors
    for label, measured in results.items():
        if not label.startswith("cp"):
            needed = measured.peak - measured.baseline
            assert needed < 3 * 33_600_000 + constant, f"{label}: {needed / 1e6:.0f} MB"


@pytest.mark.slow
def test_writers_are_measured_in_turn(small, tmp_path):
    _passes(small, check_the_rounds, tmp_path)


def check_the_rounds(tmp_path):
    rounds = rounds_of_writers(SHAPES["tiny"], tmp_path, 2, Console(quiet=True))
    labels, seconds, to_copy, to_compared_copy = (list(rounds.columns[column].cells) for column in range(4))
    writers = ["HF to Megatron", "HF to GGUF as bf16", "HF to GGUF as q8_0"]
    assert labels == ["cp and sync", *writers, "cp, sync and cmp", *(f"{writer}, verified" for writer in writers)]
    assert all(len(cell.split(", ")) == 2 for cell in seconds)
    assert to_copy[0] == to_compared_copy[4] == "1.00"
