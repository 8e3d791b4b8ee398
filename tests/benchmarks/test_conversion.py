from __future__ import annotations

from rich.console import Console

from nemo_pvs.checkpoints.huggingface import HuggingFaceSource
from nemo_pvs.checkpoints.source import shape_of
from tests.benchmarks.conversion import SHAPES, benchmark, half_width
from tests.benchmarks.measure import Measured, measure


def test_the_benchmark_runs_and_leaves_its_input(tmp_path):
    results = benchmark(SHAPES["tiny"], tmp_path, Console(quiet=True))
    assert len(results) == 9
    assert all(0 < measured.seconds < 60 and measured.peak >= measured.baseline for measured in results.values())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert shape_of(HuggingFaceSource(tmp_path / "hf")) == SHAPES["tiny"]


def test_half_of_8b_is_4b():
    target = half_width(SHAPES["llama31_8b"]).target
    assert (target.hidden, target.ffn, target.kv_groups) == (3072, 9216, 8)
    assert 3.9e9 < target.parameters < 4.8e9


def test_memory_is_counted_from_before_the_work():
    def work():
        return len(bytearray(b"x" * 50_000_000))

    measured = measure(work)
    assert isinstance(measured, Measured)
    assert 90e6 < measured.peak - measured.baseline < 130e6  # the bytes and their copy
