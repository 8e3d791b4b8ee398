import pytest

from nemo_pvs.model.shape import Shape
from tests.benchmarks.training_step import plain_job, train
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel


def test_both_recipes_train_the_same_model_on_the_same_data(tmp_path):
    shape = Shape(layers=2, hidden=64, ffn=96, heads=4, kv_groups=2, head_dim=16, vocab=128, tied=False)
    job = plain_job(tmp_path, shape, sequence_length=32, batch=2, steps=5)
    (ours,), (theirs,) = (run_ranks(1, train, job, name) for name in ("nemo_pvs", "NeMo"))
    assert 0 < ours.seconds < 60
    assert 0 < theirs.seconds < 60
    assert ours.loss == pytest.approx(theirs.loss, abs=0.2)  # both are near ln 128: random weights, random tokens
    assert ours.loss == pytest.approx(4.85, abs=0.3)
