import pytest

from nemo_pvs.recipe import Layout
from nemo_pvs.recipe_blocks import Distillation
from tests.benchmarks.distillation import distilled_job, flops_ratio, measure

pytestmark = pytest.mark.parallel


def test_a_teacher_costs_about_its_forward_pass(tmp_path):
    job = distilled_job(tmp_path, hidden=256, layers=4, vocab=512, steps=12)
    assert 1.5 < flops_ratio(job) < 2
    cost = measure(job, Layout(), Distillation(teacher="elsewhere"))
    assert cost.plain_seconds < cost.distilled_seconds < 3 * cost.plain_seconds
