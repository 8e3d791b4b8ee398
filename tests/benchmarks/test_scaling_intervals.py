import pytest

from tests.benchmarks.scaling_intervals import table
from tests.scaling.coverage import CASES


@pytest.mark.slow
def test_every_case_is_measured():
    assert table(repetitions=2, draws=39).row_count == len(CASES)
