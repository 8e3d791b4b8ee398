import pytest

from nemo_pvs.recipe import Layout
from tests.benchmarks.distillation import distilled_job
from tests.benchmarks.mask_learning import measure

pytestmark = pytest.mark.parallel


def test_learning_masks_costs_less_than_another_step(tmp_path):
    job = distilled_job(tmp_path, hidden=256, layers=4, vocab=512, steps=12)
    cost = measure(job, Layout())
    assert cost.masked_seconds < 2 * cost.plain_seconds
