import pytest

from tests.benchmarks.masked_training import measure, sparse_job
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel


def test_masks_take_a_bit_a_weight_and_little_time(tmp_path):
    [cost] = run_ranks(1, measure, sparse_job(tmp_path, hidden=64, layers=2, tokens_per_step=256, steps=12))
    assert cost.weights == 2 * (4 + 9) * 64**2
    assert 8 * cost.mask_bytes == cost.weights
    assert 0 < cost.mask_seconds < cost.masked_seconds
