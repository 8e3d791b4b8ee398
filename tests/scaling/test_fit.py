"""Fits find what the curves were drawn from, and say how well."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import t as student

from nemo_pvs.errors import UserError
from nemo_pvs.scaling import bootstrap
from nemo_pvs.scaling.advise import NOISE
from nemo_pvs.scaling.estimate import Points, fit_parameters, polish, predict
from nemo_pvs.scaling.fit import LAWS, Form, fit, load_fits, save_fits
from nemo_pvs.scaling.held_out import held_out, slope_difference
from nemo_pvs.scaling.law import Bounds
from nemo_pvs.scaling.per_run import PerRun
from nemo_pvs.scaling.plot import write_figure
from nemo_pvs.scaling.series import LossSeries
from nemo_pvs.scaling.sources import read_series
from tests.conftest import cases

from .conftest import TRUTH, Draw
from .coverage import CASES, coverage

ONE = {"parents": (8,), "ratios": (0.25,)}


def _series(drawn: Draw, form: Form, **settings: object) -> list[LossSeries]:
    return drawn(form, **({**ONE, **settings} if form == "per-run" else settings))


@pytest.mark.parametrize("form", ["p2", "chinchilla", "per-run"])
def test_without_noise_the_parameters_come_back(drawn: Draw, form: Form) -> None:
    series = _series(drawn, form)
    points = Points.of(series)
    values = fit_parameters(LAWS[form], points)
    assert np.abs(np.log(predict(LAWS[form], values, points) / points.losses)).max() < 1e-5
    # N_C, alpha and E of the P2 law hardly differ in what they do (four parents): 5 % there.
    np.testing.assert_allclose(values, list(TRUTH[form].values()), rtol=0.05 if form == "p2" else 1e-3)


def test_short_and_long_runs_are_fitted_alike(drawn: Draw) -> None:
    """Tokens in other units are the same curve, down to demonstrations of thousands of tokens."""
    (series,) = _series(drawn, "per-run", billions=np.arange(1, 7))
    steep = dataclasses.replace(series, losses=(8.566, 7.643, 7.706, 7.776, 7.675, 7.628))
    short = dataclasses.replace(steep, tokens=tuple(count * 8.192e-6 for count in steep.tokens))
    long, brief = (fit("per-run", [one], draws=40) for one in (steep, short))
    assert brief.rmse == pytest.approx(long.rmse, rel=1e-4)
    for name in ("beta", "E"):
        assert brief.parameters[name] == pytest.approx(long.parameters[name], rel=1e-3)
        assert brief.intervals[name] == pytest.approx(long.intervals[name], rel=0.02)
    assert "beta is 2, at the edge of its range: these losses hardly follow the law" in brief.warnings


@pytest.mark.slow
@pytest.mark.parametrize("form", ["p2", "chinchilla", "per-run"])
def test_at_1_percent_noise_the_truth_is_in_the_intervals(drawn: Draw, form: Form) -> None:
    many = np.geomspace(0.05, 1, 60)
    found = fit(form, _series(drawn, form, noise=0.01, seed=1, billions=many), draws=100)
    for name, (low, high) in found.intervals.items():
        assert low <= TRUTH[form][name] <= high, name
    assert found.rmse == pytest.approx(0.01 * np.mean(Points.of(found.series).losses), rel=0.2)
    assert found.scatter == pytest.approx(0.01, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "repetitions"), [("per-run, 5 points as in Figure 1", 150), ("chinchilla, 3 x 4 points", 80)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(case: str, repetitions: int) -> None:
    """Of parameters and of predictions; tests/benchmarks/scaling_intervals.py has every law, and more repetitions."""
    found = coverage(CASES[case], repetitions)
    means = {kind: np.mean([shares[kind] for shares in found.values()]) for kind in ("calibrated", "resampled")}
    assert 0.93 <= means["calibrated"] <= 0.97
    assert min(shares["calibrated"] for shares in found.values()) > 0.9
    assert means["resampled"] < 0.93, "what percentiles of resampled residuals cover must not pass for this"


@pytest.mark.parametrize("form", ["p2", "chinchilla", "per-run"])
def test_fits_that_run_together_find_what_scipy_finds(drawn: Draw, form: Form) -> None:
    law, points = LAWS[form], Points.of(_series(drawn, form, noise=0.01, seed=2))
    values = fit_parameters(law, points)
    losses = points.losses * np.exp(0.01 * np.random.default_rng(0).standard_normal((3, len(points.losses))))
    costs, _ = polish(law, points, np.tile(values, (3, 1)), losses)
    low = [bounds.low for bounds in law.exponents] + [0.0] * len(law.coefficients)
    high = [bounds.high for bounds in law.exponents] + [np.inf] * len(law.coefficients)
    inside = np.clip(values, np.array(low) + 1e-9, np.array(high) - 1e-9)
    for cost, measured in zip(costs, losses, strict=True):
        alone = least_squares(
            lambda x, measured=measured: np.log(np.maximum(predict(law, x, points), 1e-9) / measured),
            inside, bounds=(low, high), loss="huber", f_scale=0.01, x_scale="jac", max_nfev=2000,
        )  # fmt: skip
        assert cost == pytest.approx(alone.cost, rel=1e-5)


@pytest.mark.slow
def test_the_widths_of_a_straight_line_are_students(drawn: Draw) -> None:
    """With the exponent held, a law is a line; its intervals are then those of every textbook."""
    (series,) = _series(drawn, "per-run", noise=0.002, seed=3, billions=np.geomspace(0.05, 1, 6))

    class Line(PerRun):
        exponents = (Bounds("beta", 0.4, 0.4),)

    points = Points.of([series])
    values = fit_parameters(Line(), points)
    _, draws = bootstrap.draw(Line(), points, values, 9999, np.random.default_rng(0), None)
    low, high = bootstrap.confidence_interval(draws)
    design = np.column_stack([np.ones(6), (points.tokens / 1e9) ** -0.4]) / points.losses[:, None]
    coefficients, _, _, _ = np.linalg.lstsq(design, np.ones(6), rcond=None)
    # Two parameters, but three are counted: the exponent usually is one.
    scatter = np.sum((design @ coefficients - 1) ** 2) / (6 - 3)
    errors = np.sqrt(scatter * np.diag(np.linalg.inv(design.T @ design)))
    np.testing.assert_allclose((high - low)[1:] / 2, student.ppf(0.975, 3) * errors, rtol=0.05)


def test_an_outlier_moves_the_fit_less_than_it_moves_least_squares(drawn: Draw) -> None:
    (series,) = _series(drawn, "per-run")
    losses = [loss * (1.3 if index == 10 else 1) for index, loss in enumerate(series.losses)]
    points = Points.of([dataclasses.replace(series, losses=tuple(losses))])
    fitted = predict(LAWS["per-run"], fit_parameters(LAWS["per-run"], points), points)
    off = np.abs(np.log(fitted / np.array(series.losses)))
    x = np.array(series.tokens)[:, None] / 1e9
    best = np.inf, np.zeros_like(fitted)
    for beta in np.linspace(0.02, 2, 100):
        features = np.hstack([np.ones_like(x), x**-beta])
        coefficients, *_ = np.linalg.lstsq(features, np.array(losses), rcond=None)
        line = features @ coefficients
        best = min(best, (float(np.sum((line - losses) ** 2)), line), key=lambda pair: pair[0])
    assert off.max() < 0.25 * np.abs(np.log(best[1] / np.array(series.losses))).max()


def test_each_arm_of_figure_1_is_fitted(tmp_path: Path) -> None:
    # By hand: E and beta of arXiv 2606.14150's Figure 1 left, rmse .0035, .024, .014, .012.
    by_hand = {"depth, pruned": (2.340, 0.35), "depth, random": (2.371, 0.54), "width, pruned": (2.317, 0.49)}
    fits = [fit("per-run", [series], draws=39) for series in read_series(["published"])]
    assert [one.rmse < 0.03 for one in fits] == [True] * 4
    for name, (floor, beta) in by_hand.items():
        found = next(one for one in fits if name in one.name).parameters
        assert (found["E"], found["beta"]) == (pytest.approx(floor, abs=0.03), pytest.approx(beta, abs=0.06))
    assert all("5 points for 3 parameters" in one.warnings[0] for one in fits)
    squares, freedom = sum(len(one.series[0].tokens) * one.rmse**2 for one in fits), 4 * (5 - 3)
    assert NOISE["nats"] == pytest.approx((2 * squares / freedom) ** 0.5, rel=0.03)
    write_figure(fits, tmp_path / "fit.svg")
    figure = (tmp_path / "fit.svg").read_text()
    assert all(one.name in figure for one in fits)


@pytest.mark.slow
def test_the_law_meets_what_was_held_out(drawn: Draw) -> None:
    found = fit("p2", drawn("p2"), draws=39)
    names = [(held.name, held.points) for held in found.held_out]
    late = sum(tokens > 0.8 * 1e9 for tokens in np.geomspace(0.05, 1, 20) * 1e9)
    assert names == [("last 20 % of tokens", 12 * late), ("largest model", 60), ("largest ratio", 80)]
    for held in found.held_out:
        assert held.rmse is not None
        assert held.rmse < 2e-3
        assert held.slope_difference is not None
        assert held.error == pytest.approx(0, abs=2e-3)
        assert held.error_interval is not None
        assert held.error_interval[0] <= held.error <= held.error_interval[1]
    assert found.slope_difference == pytest.approx(0, abs=1e-4)


def test_a_law_that_is_wrong_fails_on_what_was_held_out(drawn: Draw) -> None:
    series = [
        dataclasses.replace(
            one, losses=tuple(loss + (0.3 if one.parent_parameters == 20 * 10**9 else 0) for loss in one.losses)
        )
        for one in drawn("p2")
    ]
    largest = next(held for held in fit("p2", series, draws=39).held_out if held.name == "largest model")
    assert largest.rmse == pytest.approx(0.3, abs=0.02)
    assert largest.error_interval is not None
    assert 0.25 < largest.error_interval[0] < largest.error_interval[1] < 0.35


@pytest.mark.slow
def test_95_of_100_intervals_of_the_held_out_error_contain_zero(drawn: Draw) -> None:
    """If the law holds; four sizes of two targets each, of which the largest is held out."""
    experiments, inside = cases(60), 0
    for seed in range(experiments):
        series = drawn("chinchilla", noise=0.003, seed=seed, ratios=(0.15, 0.35), billions=(0.05, 0.1, 0.3, 1))
        largest = held_out(LAWS["chinchilla"], series, draws=79)[1]
        assert largest.error_interval is not None
        inside += largest.error_interval[0] < 0 < largest.error_interval[1]
    # Within three standard errors of a binomial share.
    assert inside / experiments > 0.95 - 3 * (0.95 * 0.05 / experiments) ** 0.5


def test_slopes_are_compared_between_neighbours(drawn: Draw) -> None:
    (series,) = _series(drawn, "per-run", billions=(1, 2, 4, 8, 16, 32, 64))
    points = Points.of([series])
    values = np.array([0.4, 2.3, 0.9 + 0.5])  # the truth with B too large by 0.5
    apart = np.diff(points.tokens) / 1e9
    too_steep = np.abs(np.diff(0.5 * (points.tokens / 1e9) ** -0.4)) / apart
    assert slope_difference(LAWS["per-run"], values, [series]) == pytest.approx(too_steep.mean())
    assert slope_difference(LAWS["per-run"], values, [dataclasses.replace(series, tokens=(1e9,), losses=(3,))]) is None


def test_two_seeds_at_equal_tokens_have_no_slope_between_them(drawn: Draw) -> None:
    (series,) = _series(drawn, "per-run", billions=(1, 2, 4, 8, 16))
    twice = dataclasses.replace(
        series,
        tokens=tuple(np.repeat(series.tokens, 2).tolist()),
        losses=tuple((np.repeat(series.losses, 2) + np.tile([-0.1, 0.1], 5)).tolist()),
    )
    values = np.array([0.4, 2.3, 1.4])
    alone = slope_difference(LAWS["per-run"], values, [series])
    assert slope_difference(LAWS["per-run"], values, [twice]) == pytest.approx(alone)


@pytest.mark.parametrize(
    ("form", "settings", "free"),
    [
        ("chinchilla", {"parents": (1, 3), "ratios": (0.25,)}, ["alpha", "E", "A"]),
        ("chinchilla", {"parents": (1, 2, 4, 8), "ratios": (0.25, 0.5), "billions": (1,)}, ["beta", "E", "B"]),
        ("p2", {"parents": (1, 8), "ratios": (0.2, 0.3)}, ["alpha", "N_C", "E"]),
    ],
)
def test_the_interval_of_what_points_do_not_determine_is_wide(
    drawn: Draw, form: Form, settings: dict[str, object], free: list[str]
) -> None:
    found = fit(form, drawn(form, noise=0.002, **settings), draws=39)
    assert any(f"these points do not determine {', '.join(free)}:" in warning for warning in found.warnings)
    for name in free:
        low, high = found.intervals[name]
        assert low <= TRUTH[form][name] <= high, name
    low, high = found.intervals[free[0]]
    assert high > 10 * low


def test_a_point_for_every_parameter_determines_them(drawn: Draw) -> None:
    found = fit("chinchilla", drawn("chinchilla", noise=0.002, parents=(1, 3, 9), ratios=(0.25,)), draws=39)
    assert not any("do not determine" in warning for warning in found.warnings)


def test_parents_that_differ_in_their_ratios_too_are_fitted() -> None:
    """Without the largest of these, size and ratio cannot be told apart; that was a singular matrix."""
    noise, series = np.random.default_rng(1).standard_normal(26)[14:], []
    for number, (size, ratio, parent_loss) in enumerate(((1.0, 0.2, 2.6), (2.0, 0.3, 2.4), (4.0, 0.35, 2.2))):
        tokens = np.array([0.1, 0.2, 0.4, 0.8])
        losses = parent_loss + ratio**1.5 * size**-0.2 * (0.8 * size**-0.1 + 0.6 * tokens**-0.3 + 0.4)
        losses *= np.exp(0.002 * noise[4 * number : 4 * number + 4])
        parameters = int(size * 1e9 * (1 - ratio)), int(size * 1e9)
        counts = tuple((tokens * 1e9).tolist())
        series.append(LossSeries(str(size), counts, tuple(losses.tolist()), "pruned", *parameters, parent_loss, True))
    largest = fit("p2", series, draws=99).held_out[1]
    assert largest.error_interval is not None
    assert largest.error_interval[0] < 0 < largest.error_interval[1]


def test_a_model_that_is_no_smaller_than_its_parent_has_no_p2_law(drawn: Draw) -> None:
    series = drawn("p2")
    same = dataclasses.replace(series[0], parameters=series[0].parent_parameters)
    with pytest.raises(UserError, match="so nothing was pruned"):
        fit("p2", [same, *series[1:]])


def test_what_cannot_be_held_out_is_said(drawn: Draw) -> None:
    found = fit("chinchilla", drawn("chinchilla", parents=(1, 3), ratios=(0.25,)), draws=39)
    largest = found.held_out[1]
    assert largest.rmse is None
    assert "at least 2 sizes" in largest.reason


def test_a_fit_survives_its_file(drawn: Draw, tmp_path: Path) -> None:
    fits = [fit("p2", drawn("p2", noise=0.01), draws=39)]
    save_fits(fits, tmp_path / "fit.json")
    assert load_fits(tmp_path / "fit.json") == fits
    data = json.loads((tmp_path / "fit.json").read_text())
    data[0]["form"] = "astrology"
    (tmp_path / "fit.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"not a file of pvs scaling-fit: 0\.form"):
        load_fits(tmp_path / "fit.json")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_fit(drawn: Draw) -> None:
    series = drawn("p2", noise=0.01)
    assert fit("p2", series, draws=39, seed=3) == fit("p2", series, draws=39, seed=3)


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("p2", {"parents": (8,)}, "at least 2 parents and 2 ratios, and there are 1 and 3"),
        ("p2", {"ratios": (0.25,)}, "at least 2 parents and 2 ratios, and there are 4 and 1"),
        ("p2", {"parents": (1, 8), "ratios": (0.15, 0.35), "billions": (1,)}, "4 points do not determine the 7"),
        ("chinchilla", {"parents": (1,), "ratios": (0.25,)}, "at least 2 sizes"),
        ("per-run", {"billions": (1, 2, 3)}, "3 points do not determine the 3 parameters"),
    ],
)
def test_too_little_to_fit_is_refused(drawn: Draw, form: Form, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(form, _series(drawn, form, **settings), draws=39)


def test_scratch_has_no_p2_law(drawn: Draw) -> None:
    series = [dataclasses.replace(drawn("p2")[0], initialisation="random"), *drawn("p2")[1:]]
    with pytest.raises(UserError, match="needs a pruned model"):
        fit("p2", series)
    with pytest.raises(UserError, match="no term for the start of training"):
        fit("chinchilla", series)


@pytest.mark.slow
def test_beyond_its_validity_the_p2_law_warns(drawn: Draw) -> None:
    assert fit("p2", drawn("p2"), draws=39).warnings == []
    far = fit("p2", drawn("p2", parents=(1, 8), ratios=(0.2, 0.5), billions=np.geomspace(0.1, 20, 20)), draws=39)
    assert "ratios up to 0.50 are beyond the 0.35" in far.warnings[0]
    assert "20 B tokens are beyond the 1 B" in far.warnings[1]
    assert "2 parents do not tell" in far.warnings[2]


def test_a_cosine_run_is_warned_about(drawn: Draw) -> None:
    (series,) = _series(drawn, "per-run")
    whole = dataclasses.replace(series, separate_runs=False, planned_tokens=1e9)
    cut = dataclasses.replace(series, separate_runs=False, planned_tokens=4e9)
    assert "is one cosine run" in fit("per-run", [whole], draws=39).warnings[0]
    assert "was cut short at 25% of its cosine" in fit("per-run", [cut], draws=39).warnings[0]
