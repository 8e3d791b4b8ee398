import math

import pytest

from nemo_pvs.recipe.training import Training
from nemo_pvs.training.learning_rate import quadratic_warmup_cosine

PEAK = 3e-4


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.0), (1, 9.59232e-7), (312, 2.247598e-4), (625, 2.983379e-4), (3125, 2.604594e-4), (6250, 1.65e-4),
     (12500, 3e-5), (12501, 0.0)],
)  # fmt: skip
def test_the_papers_schedule(step, rate):
    """Values of the training code's polynomial and cosine at 12,500 steps, computed apart from ours."""
    share = quadratic_warmup_cosine(step, steps=12500, warmup_steps=625, min_ratio=0.1)
    assert PEAK * share == pytest.approx(rate, rel=1e-6)


def test_without_warmup_it_is_a_cosine():
    shares = [quadratic_warmup_cosine(step, steps=8, warmup_steps=0, min_ratio=0.0) for step in range(9)]
    assert shares == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)])


@pytest.mark.parametrize(("steps", "expected"), [(12500, 625), (50000, 2000), (100, 5), (19, 0)])
def test_warmup_steps_are_a_share_with_a_limit(steps, expected):
    settings = {"sequence_length": 8, "global_batch_size": 1, "learning_rate": 1, "validation_samples": 1}
    training = Training(tokens=8 * steps, warmup_fraction=0.05, warmup_max_steps=2000, **settings)
    assert (training.steps, training.warmup_steps) == (steps, expected)
