import pytest

from tests.benchmarks.side_by_side import compare, contenders, make_job

pytestmark = pytest.mark.parallel


def test_one_and_two_at_a_time_are_measured(tmp_path, forked_launcher):
    job = make_job(tmp_path, hidden=32, layers=1, batch=2, steps=8)
    compared = dict(list(contenders().items())[:2])
    compare(job, compared, rounds=1)
    assert [contender.jobs for contender in compared.values()] == [None, 2]
    assert all(speed > 0 for contender in compared.values() for speed in contender.speeds)
