import pytest

from tests.benchmarks.step_costs import KINDS, TAYLOR, flops_ratio, make_job, measure

pytestmark = pytest.mark.parallel


def test_steps_are_measured(tmp_path):
    job = make_job(tmp_path, hidden=128, layers=4, vocab=256, steps=7)
    assert 1.5 < flops_ratio(job) < 2
    assert all(0 < measure(kind, job) < 60 for kind in ([*KINDS][-1], TAYLOR))
