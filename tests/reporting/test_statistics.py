"""Intervals and tests against tables, a worked example, closed forms and simulated experiments."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nemo_pvs.reporting.statistics import MeanEstimate, crossed_estimate, mean_estimate, quantile, recovered

EXPERIMENTS = 20_000


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.95, 1, 6.314),
        (0.95, 2, 2.920),
        (0.95, 4, 2.132),
        (0.95, 30, 1.697),
    ],
)
def test_quantiles_are_those_of_the_tables(probability: float, degrees: int, expected: float) -> None:
    assert quantile(probability, degrees) == pytest.approx(expected, abs=5e-4)


def test_quantiles_of_one_and_two_degrees_have_closed_forms() -> None:
    assert quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475))
    assert quantile(0.975, 2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)))


def test_three_seeds_by_hand() -> None:
    """1.0, 1.2 and 1.1: mean 1.1, deviation 0.1, standard error 0.1 / √3, t = 4.3027 and 2.9200."""
    found = mean_estimate([1.0, 1.2, 1.1])
    assert found is not None
    assert (found.count, found.degrees, found.sign) == (3, 2, 1)
    assert found.mean == pytest.approx(1.1)
    assert found.deviation == pytest.approx(0.1)
    assert found.half_width == pytest.approx(0.24841, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((0.85159, 1.34841), abs=1e-5)
    assert (found.lower_bound, found.upper_bound) == pytest.approx((0.93142, 1.26858), abs=1e-5)


def test_too_little_has_no_interval() -> None:
    assert mean_estimate([]) is None
    for values in ([1.0], [1.0, math.nan], [1.0, math.inf], [-math.inf, math.inf]):
        found = mean_estimate(values)
        assert found is not None
        assert found.deviation is found.half_width is found.low is found.high is found.lower_bound is None
        assert found.sign == 0


def test_the_sign_is_that_of_the_whole_interval() -> None:
    signs = [mean_estimate(values).sign for values in ([1.0, 1.1], [-1.0, -1.1], [-0.1, 0.3], [0.5, 0.5])]  # type: ignore[union-attr]
    assert signs == [1, -1, 0, 1]


def test_several_comparisons_widen_the_interval() -> None:
    """With 2 degrees of freedom t = x / √((1 - x²) / 2) for the confidence x: 4.30 alone, 6.21 as one of two."""
    for comparisons, confidence in ((1, 0.95), (2, 0.975), (10, 0.995)):
        edge = confidence * math.sqrt(2 / (1 - confidence**2)) / math.sqrt(3)
        for mean, sign in ((edge * 1.001, 1), (edge * 0.999, 0), (-edge * 1.001, -1)):
            found = mean_estimate([mean - 1, mean, mean + 1])
            assert found is not None
            assert found.sign_among(comparisons) == sign


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_95_of_100_intervals_contain_the_truth(seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(0.7, 0.3, (EXPERIMENTS, seeds)).tolist()
    found = [mean_estimate(experiment) for experiment in values]
    covered = sum(item.low <= 0.7 <= item.high for item in found)  # type: ignore[union-attr,operator]
    # Within 4 standard errors of a binomial share; those of a normal quantile would contain 81 % with 3 seeds.
    assert covered / EXPERIMENTS == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / EXPERIMENTS))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_5_of_100_models_at_the_margin_pass_as_not_inferior(seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    at_margin = generator.normal(-0.5, 0.2, (EXPERIMENTS, seeds)).tolist()
    verdicts = [recovered(mean_estimate(experiment), 0.5) for experiment in at_margin]  # type: ignore[arg-type]
    tolerance = 4 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)
    passed = sum(verdict in ("not inferior", "equivalent") for verdict in verdicts) / EXPERIMENTS
    assert passed == pytest.approx(0.05, abs=tolerance)
    assert verdicts.count("inferior") / EXPERIMENTS == pytest.approx(0.05, abs=tolerance)
    better = generator.normal(0.5, 0.2, (EXPERIMENTS, seeds)).tolist()
    equivalent = sum(recovered(mean_estimate(experiment), 0.5) == "equivalent" for experiment in better)  # type: ignore[arg-type]
    assert equivalent / EXPERIMENTS < 0.05 + tolerance


@pytest.mark.parametrize(
    ("mean", "stderr", "verdict"),
    [
        (0.0, 0.1, "equivalent"),  # bounds ±0.29
        (0.4, 0.1, "not inferior"),  # 0.11 to 0.69: perhaps better by more than the margin
        (-0.4, 0.1, "undecided"),  # -0.69 to -0.11
        (-0.9, 0.1, "inferior"),  # -1.19 to -0.61
        (-0.5, 0.0, "undecided"),  # exactly at the margin
    ],
)
def test_verdicts(mean: float, stderr: float, verdict: str) -> None:
    assert recovered(MeanEstimate(mean, 3, stderr, stderr, 2), 0.5) == verdict


def test_without_an_error_nothing_is_decided() -> None:
    assert recovered(MeanEstimate(0.0, 1), 0.5) == "undecided"


def test_one_seed_is_students_t_over_questions() -> None:
    differences = [1.0, 0.0, 0.0, -1.0, 1.0, 0.0]
    found, expected = crossed_estimate([[differences]]), mean_estimate(differences)
    assert expected is not None
    assert (found.mean, found.stderr, found.degrees) == pytest.approx(
        (expected.mean, expected.stderr, expected.degrees)
    )
    assert (found.count, found.deviation) == (1, None)


def test_the_two_way_layout_by_hand() -> None:
    """Two seeds, three questions: MS_seeds 6, MS_questions 4.5, MS_rest 0.5; (6 + 4.5 - 0.5) / 6 = 5 / 3."""
    found = crossed_estimate([[[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]])
    assert found.mean == 3.0
    assert found.deviation == pytest.approx(math.sqrt(2))
    assert found.stderr == pytest.approx(math.sqrt(5 / 3))
    # Satterthwaite: (5 / 3)² / (1² / 1 + (4.5 / 6)² / 2 + (0.5 / 6)² / 2)
    assert found.degrees == pytest.approx((5 / 3) ** 2 / (1 + (4.5 / 6) ** 2 / 2 + (0.5 / 6) ** 2 / 2))


def test_questions_alike_leave_the_seeds_and_seeds_alike_the_questions() -> None:
    by_seed = crossed_estimate([[[0.1] * 5, [0.3] * 5, [0.2] * 5]])
    expected = mean_estimate([0.1, 0.3, 0.2])
    assert expected is not None
    assert (by_seed.stderr, by_seed.degrees) == pytest.approx((expected.stderr, expected.degrees))
    questions = [0.0, 1.0, 1.0, 0.0, -1.0]
    by_question, alone = crossed_estimate([[questions] * 3]), mean_estimate(questions)
    assert alone is not None
    assert (by_question.stderr, by_question.degrees) == pytest.approx((alone.stderr, alone.degrees))


def test_an_average_weighs_tasks_and_not_questions_the_same() -> None:
    few, many = [[0.0, 1.0]], [[0.0, 0.0, 0.0, 1.0]]
    found = crossed_estimate([few, many])
    assert found.mean == pytest.approx((0.5 + 0.25) / 2)
    assert found.stderr == pytest.approx(math.sqrt(0.5 / 2 + 0.25 / 4) / 2)
    # Seeds are shared by tasks: what one adds to both does not average out.
    shifts = np.array([[-0.1], [0.0], [0.1]])
    together = crossed_estimate([shifts + np.zeros(4), shifts + np.zeros(9)])
    assert together.stderr == pytest.approx(0.1 / math.sqrt(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_question", "of_both"), [(1, 0.0, 1.0, 0.5), (3, 0.5, 0.1, 0.5), (3, 0.1, 1.0, 1.0)]
)
def test_by_question_and_seed_no_more_than_5_of_100_at_the_margin_pass(
    seeds: int, of_seed: float, of_question: float, of_both: float
) -> None:
    """Both seeds and questions are drawn; taking only one for random would pass many more."""
    generator, experiments, questions = np.random.default_rng(7), 1500, 40
    passed = 0
    for _ in range(experiments):
        table = -0.5 + generator.normal(0, of_seed, (seeds, 1)) + generator.normal(0, of_question, (1, questions))
        table = table + generator.normal(0, of_both, (seeds, questions))
        passed += recovered(crossed_estimate([table]), 0.5) in ("not inferior", "equivalent")
    tolerance = 4 * math.sqrt(0.05 * 0.95 / experiments)
    assert 0.02 < passed / experiments < 0.05 + tolerance
