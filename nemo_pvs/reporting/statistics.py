"""Means with confidence intervals, and the test of non-inferiority: the one place where a report computes them.

Quantiles of Student's t come from SciPy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
"""Confidence of two-sided intervals and of one-sided bounds."""

Recovered = Literal["equivalent", "not inferior", "inferior", "undecided"]


@dataclass(frozen=True)
class MeanEstimate:
    """A mean, and how well it is known."""

    mean: float
    count: int
    """Number of seeds."""
    deviation: float | None = None
    """Standard deviation over seeds (n - 1); None for one seed, or if a value is not finite."""
    stderr: float | None = None
    """Standard error of the mean; None if unknown."""
    degrees: float = 0.0
    """Degrees of freedom of ``stderr``."""

    @property
    def half_width(self) -> float | None:
        """Half of the two-sided 95 % interval; None if there is no interval."""
        if self.stderr is None:
            return None
        return self.stderr * quantile((1 + LEVEL) / 2, self.degrees)

    @property
    def low(self) -> float | None:
        """Lower end of the two-sided 95 % interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the two-sided 95 % interval."""
        return None if self.half_width is None else self.mean + self.half_width

    @property
    def sign(self) -> int:
        """1 if the whole interval is above zero, -1 if it is below, and 0 if it contains zero or is unknown."""
        return self.sign_among(1)

    def sign_among(self, comparisons: int) -> int:
        """Return ``sign`` with the interval that holds at 95 % for this many comparisons together (Bonferroni)."""
        if self.stderr is None:
            return 0
        half_width = self.stderr * quantile(1 - (1 - LEVEL) / 2 / comparisons, self.degrees)
        return int(self.mean > half_width) - int(self.mean < -half_width)

    @property
    def lower_bound(self) -> float | None:
        """One-sided 95 % lower confidence bound."""
        return None if self.stderr is None else self.mean - self.stderr * quantile(LEVEL, self.degrees)

    @property
    def upper_bound(self) -> float | None:
        """One-sided 95 % upper confidence bound."""
        return None if self.stderr is None else self.mean + self.stderr * quantile(LEVEL, self.degrees)


def quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t."""
    return float(stdtrit(degrees, probability))


def mean_estimate(values: Sequence[float]) -> MeanEstimate | None:
    """Return the mean over seeds with Student's t interval of n - 1 degrees of freedom; None without values.

    One value has no interval, and neither have values that are not all finite.
    """
    if not values:
        return None
    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):
        return MeanEstimate(sum(values) / count, count)  # fmean refuses to add opposite infinities
    mean = statistics.fmean(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return MeanEstimate(mean, count, deviation, deviation / math.sqrt(count), count - 1)


def crossed_estimate(tasks: Sequence[Any]) -> MeanEstimate:
    """Return the mean difference of two models over questions and seeds, where every seed answers every question.

    Both the seeds and the questions are samples, so the variance of the mean has a part of each. With one table these
    are the mean squares of the two-way layout: (MS_seeds + MS_questions - MS_rest) / (seeds * questions), with
    Satterthwaite's degrees of freedom. Several tasks weigh the same; their questions are independent of each other.
    The variance is never less than either part alone. One seed has only the part of the questions.

    Args:
        tasks: For each task the differences, an array of (seeds, questions), with at least two questions.
    """
    tables = [np.asarray(task, dtype=float) for task in tasks]
    seeds = tables[0].shape[0]
    by_seed = np.mean([table.mean(axis=1) for table in tables], axis=0)  # (seeds,)
    mean = float(by_seed.mean())
    questions, terms = 0.0, []  # terms: a part of the variance, and its degrees of freedom
    rest = 0.0
    for table in tables:
        count = table.shape[1]
        part = float(table.mean(axis=0).var(ddof=1)) / count / len(tables) ** 2
        questions += part
        terms.append((part, count - 1))
        if seeds > 1:
            residual = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
            free = (seeds - 1) * (count - 1)
            part = float((residual**2).sum()) / free / (seeds * count) / len(tables) ** 2
            rest += part
            terms.append((part, free))
    if seeds == 1:
        return MeanEstimate(mean, 1, None, math.sqrt(questions), _satterthwaite(questions, terms, 1))
    deviation = float(by_seed.std(ddof=1))
    of_seeds = deviation**2 / seeds
    terms.append((of_seeds, seeds - 1))
    variance = max(of_seeds + questions - rest, of_seeds, questions)
    return MeanEstimate(mean, seeds, deviation, math.sqrt(variance), _satterthwaite(variance, terms, seeds - 1))


def recovered(difference: MeanEstimate, margin: float) -> Recovered:
    """Test whether a difference in quality, positive where the model is better, is within a margin.

    Each side is a one-sided test at 5 %: not inferior if the lower bound exceeds ``-margin``, equivalent if the upper
    bound is also below ``margin`` (two one-sided tests), inferior if the upper bound is below ``-margin``. The bounds
    are Student's: they are too narrow where nearly all single differences are equal.
    """
    low, high = difference.lower_bound, difference.upper_bound
    if low is None or high is None or not difference.stderr:
        return "undecided"  # with no variation among the differences, the bounds mean nothing
    if low > -margin:
        return "equivalent" if high < margin else "not inferior"
    return "inferior" if high < -margin else "undecided"


def _satterthwaite(variance: float, terms: Sequence[tuple[float, float]], least: float) -> float:
    """Return the effective degrees of freedom of a variance made of parts."""
    squares = sum(part**2 / degrees for part, degrees in terms)
    return max(variance**2 / squares, least) if squares else max(least, 1.0)
