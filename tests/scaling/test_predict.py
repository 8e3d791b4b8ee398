from __future__ import annotations

import math

import numpy as np
import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.curve import Curve
from nemo_pvs.scaling.fit import Fit, fit
from nemo_pvs.scaling.predict import curve_of, extrapolation, loss_at, overtaking, tokens_at_gain, tokens_to
from nemo_pvs.scaling.series import Conditions, LossSeries

from .conftest import PER_RUN, Draw

TRUE = Curve(PER_RUN["E"], PER_RUN["B"], PER_RUN["beta"])
BILLIONS = np.geomspace(1, 100, 40)


def _fit_of(curve: Curve, name: str, seed: int = 5) -> Fit:
    losses = curve.loss(BILLIONS * 1e9) * np.exp(0.003 * np.random.default_rng(seed).standard_normal(len(BILLIONS)))
    start = "random" if name == "scratch" else "pruned"
    series = LossSeries(name, tuple(BILLIONS * 1e9), tuple(losses), start, 10**9, separate_runs=True)  # type: ignore[arg-type]
    return fit("per-run", [series], draws=100)


@pytest.fixture(scope="module")
def pruned() -> Fit:
    return _fit_of(TRUE, "pruned")


def test_a_value_lies_in_its_interval(pruned: Fit) -> None:
    for estimate in (loss_at(pruned, 200e9), tokens_to(pruned, 2.5), tokens_at_gain(pruned, 0.001)):
        assert estimate.low <= estimate.value <= estimate.high


@pytest.mark.slow
def test_the_interval_of_a_loss_is_for_a_measurement(drawn: Draw) -> None:
    # 95 of 100 new measurements lie in it, not only the curve.
    inside = []
    for seed in range(60):
        series = drawn("per-run", noise=0.01, seed=seed, parents=(8,), ratios=(0.25,))
        interval = loss_at(fit("per-run", series, seed=10_000 + seed), 0.5e9)
        new = TRUE.loss(0.5e9) * np.exp(0.01 * np.random.default_rng(1000 + seed).standard_normal(40))
        inside.append(np.mean((new >= interval.low) & (new <= interval.high)))
    assert 0.93 <= np.mean(inside) <= 0.97


def test_fits_of_one_seed_are_told_apart_independently(drawn: Draw) -> None:
    """Draws of two fits with one seed come of the same random numbers; paired, both curves would shift alike."""
    (series,) = drawn("per-run", noise=0.01, seed=1, parents=(8,), ratios=(0.25,))
    one, same = (fit("per-run", [series], draws=79) for _ in range(2))
    assert one.draws == same.draws
    share = overtaking(one, same).share
    assert 0.3 < share < 0.7  # of two equal curves either is the better one; paired with itself none ever is


def test_a_loss_below_the_floor_is_never_reached(pruned: Fit) -> None:
    never = tokens_to(pruned, 2.0)
    assert (never.value, never.low, never.high) == (math.inf, math.inf, math.inf)


def test_scratch_catches_pruned_where_the_curves_meet(pruned: Fit) -> None:
    scratch = Curve(2.2, 1.5, 0.4)
    truth = scratch.overtakes(TRUE, 1e9, 1e12)
    assert truth is not None
    met = overtaking(_fit_of(scratch, "scratch"), pruned)
    assert met.tokens is not None
    assert met.tokens.low <= truth <= met.tokens.high
    assert met.share == 1.0
    assert met.horizon == pytest.approx(1e12)
    earlier = overtaking(_fit_of(scratch, "scratch"), pruned, head_start=50e9)
    assert earlier.tokens is not None
    assert earlier.tokens.value < met.tokens.value


def test_scratch_that_stays_behind_never_catches_up(pruned: Fit) -> None:
    met = overtaking(_fit_of(Curve(2.6, 1.5, 0.4), "scratch"), pruned)
    assert met.tokens is None
    assert met.share == 0.0


@pytest.mark.slow
def test_a_law_over_models_predicts_a_model(drawn: Draw) -> None:
    found = fit("p2", drawn("p2"), draws=39)
    series = drawn("p2", parents=(5,), ratios=(0.3,))[0]
    estimate = loss_at(found, series.tokens[-1], series.conditions)
    assert estimate.value == pytest.approx(series.losses[-1], rel=1e-3)
    with pytest.raises(UserError, match="p2 law needs to know the parent's parameters and loss, and the ratio"):
        curve_of(found)


def test_questions_far_beyond_the_points_are_refused_or_warned_about(pruned: Fit, drawn: Draw) -> None:
    with pytest.raises(UserError, match="cannot be predicted from a fit of up to"):
        loss_at(pruned, 2000e9)
    for ask, message in (
        (lambda: loss_at(pruned, math.nan), "cannot be predicted"),
        (lambda: tokens_at_gain(pruned, 0.0), "not above 0"),
        (lambda: tokens_at_gain(pruned, math.inf), "not above 0"),
        (lambda: tokens_to(pruned, math.nan), "A target loss of nan makes no sense"),
        (lambda: tokens_to(pruned, -1.0), "A target loss of -1 makes no sense"),
        (lambda: overtaking(pruned, pruned, head_start=-1.0), "A head start of -1 tokens makes no sense"),
    ):
        with pytest.raises(UserError, match=message):
            ask()
    assert extrapolation(pruned, 50e9) == []
    assert "outside the fitted" in extrapolation(pruned, 500e9)[0]
    over_models = fit("p2", drawn("p2"), draws=39)
    warnings = extrapolation(over_models, 1e9, Conditions(1e9, 2e9, 0.5, 2.4))
    assert len(warnings) == 1
    assert warnings[0].startswith("ratio 0.5 is outside the fitted 0.15 to 0.35")
