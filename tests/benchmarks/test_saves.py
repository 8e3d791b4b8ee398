import pytest

from tests.benchmarks.saves import FORMS, make_job, measure

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


def test_memory_is_that_of_a_part_of_one_gather_and_of_one_per_rank(tmp_path):
    costs = measure(make_job(tmp_path, ranks=2, hidden=256, layers=2), repeat=3)
    part, gathered, everywhere = (costs[form] for form in FORMS)
    assert part.memory < 0.5
    assert 1 < gathered.memory < everywhere.memory
    assert everywhere.memory > 1.8, "both ranks have all of it"
    assert all(cost.seconds > 0 for cost in costs.values())
