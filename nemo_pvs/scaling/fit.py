"""A fitted law: parameters with calibrated intervals, how well it meets points it has not seen, and its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.chinchilla import Chinchilla
from nemo_pvs.scaling.estimate import Array, Points, estimate, polish, predict
from nemo_pvs.scaling.held_out import HeldOut, held_out, slope_difference
from nemo_pvs.scaling.law import Law, names
from nemo_pvs.scaling.p2 import P2
from nemo_pvs.scaling.per_run import PerRun
from nemo_pvs.scaling.series import Series, warnings_of
from nemo_pvs.system.files import read_json, write_json

Form = Literal["p2", "chinchilla", "per-run"]
LAWS: dict[str, Law] = {P2.name: P2(), Chinchilla.name: Chinchilla(), PerRun.name: PerRun()}

_POINTS_A_PARAMETER = 3
_EDGE = 1e-4

DRAWS = 399
"""With this many, an interval ends exactly at a draw (``interval``)."""
CONFIDENCE = 95.0
"""Per cent of the intervals that hold the truth."""
FEWEST_DRAWS = 39
"""With fewer, even the whole range of the draws is narrower than an interval of 95 % should be."""
_BLOCK = 100


@dataclass(frozen=True)
class Fit:
    """A law fitted to series, as plain data."""

    form: Form
    series: list[Series]
    values: list[float]
    """Exponents, then coefficients, in the law's order; parameters and tokens in billions."""
    draws: list[list[float]]
    """The same, each from losses drawn around the fitted law (``_draw``)."""
    noise: list[float]
    """The standard deviation of ln(loss) with which each draw's losses were drawn."""
    rmse: float
    """Nats per token, over the points of the fit."""
    slope_difference: float | None
    """ASD, nats per billion tokens: see ``held_out.slope_difference``; None without two points in a series."""
    held_out: list[HeldOut]
    warnings: list[str]

    @property
    def name(self) -> str:
        """The name of its series, or how many there are."""
        return self.series[0].name if len(self.series) == 1 else f"{len(self.series)} series"

    @property
    def law(self) -> Law:
        """The law that was fitted."""
        return LAWS[self.form]

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters by name."""
        return dict(zip(names(self.law), self.values, strict=True))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each parameter."""
        low, high = interval(np.array(self.draws))
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names(self.law))}

    @property
    def scatter(self) -> float:
        """The standard deviation of ln(loss) around the law, by the degrees of freedom that the fit has left."""
        points = Points.of(self.series)
        return _scatter(points, predict(self.law, np.array(self.values), points), len(self.values))

    @property
    def range(self) -> tuple[float, float]:
        """The fewest and the most tokens of a point."""
        tokens = [count for one in self.series for count in one.tokens]
        return min(tokens), max(tokens)


def fit(
    form: Form,
    series: Sequence[Series],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Fit:
    """Fit a law to series.

    Args:
        form: which law.
        series: for ``per-run`` one, for the others several.
        draws: for the intervals. Losses are drawn as if points were independent; those of one training run are not
            quite, so its intervals are somewhat too narrow.
        seed: of the starts and draws.
        progress: called with draws done and in all.

    Raises:
        UserError: the series cannot determine the law's parameters, or there are too few draws for an interval.
    """
    if draws < FEWEST_DRAWS:
        raise UserError(f"{draws} draws give no interval of {CONFIDENCE:.0f} %; take at least {FEWEST_DRAWS}.")
    law = LAWS[form]
    warnings = [*law.check(series), *(warning for one in series for warning in warnings_of(one))]
    points = Points.of(series)
    if len(points.tokens) < _POINTS_A_PARAMETER * len(names(law)):
        warnings.append(f"{len(points.tokens)} points for {len(names(law))} parameters: the intervals are rough")
    values = estimate(law, points, seed=seed)
    for exponent, value in zip(law.exponents, values, strict=False):
        if min(value - exponent.low, exponent.high - value) < _EDGE:
            warnings.append(
                f"{exponent.name} is {value:.3g}, the edge of where the fit looks: these losses hardly follow the law"
            )
    fitted = predict(law, values, points)
    noise, drawn = _draw(law, points, values, draws, np.random.default_rng(seed), progress)
    return Fit(
        form,
        list(series),
        values.tolist(),
        drawn.tolist(),
        noise.tolist(),
        float(np.sqrt(np.mean((points.losses - fitted) ** 2))),
        slope_difference(law, values, series),
        held_out(law, series, seed=seed),
        warnings,
    )


def _draw(
    law: Law,
    points: Points,
    values: Array,
    draws: int,
    generator: np.random.Generator,
    progress: Callable[[int, int], None] | None,
) -> tuple[Array, Array]:
    """Return parameters [draws, parameters] that are as far from ``values`` as these may be from the truth.

    A parametric bootstrap whose noise is itself uncertain: each draw has a standard deviation of its own, the
    residuals' times sqrt(dof / chi^2_dof), draws losses around the fitted law with it, and fits them. For a linear law
    the draws' percentiles are then Student's interval exactly. For the laws here they are still calibrated, where
    those of resampled residuals cover 80 to 90 % on few points (tests/benchmarks/scaling_intervals.py). Percentiles
    stay where they are when a quantity is transformed, so no scale has to be chosen: intervals of positive quantities
    and of token counts, infinite ones too, come out as they would on a logarithm.

    Returns:
        The standard deviation of ln(loss) in each draw, and the parameters.
    """
    fitted = predict(law, values, points)
    freedom = len(fitted) - len(values)
    noise = _scatter(points, fitted, len(values)) * np.sqrt(freedom / generator.chisquare(freedom, draws))
    losses = fitted * np.exp(noise[:, None] * generator.standard_normal((draws, len(fitted))))
    drawn = []
    for start in range(0, draws, _BLOCK):
        block = losses[start : start + _BLOCK]
        drawn.append(polish(law, points, np.tile(values, (len(block), 1)), block)[1])
        if progress:
            progress(start + len(block), draws)
    return noise, np.concatenate(drawn)


def _scatter(points: Points, fitted: Array, parameters: int) -> float:
    residuals = np.log(points.losses) - np.log(fitted)
    return math.sqrt(float(np.sum(residuals**2)) / (len(residuals) - parameters))


def interval(draws: Array) -> tuple[Array, Array]:
    """Return the bounds of the 95 % interval from draws [draws, ...], which may be infinite.

    As many draws are left out at each end as leave it the right probability when the truth is as likely to be at any
    place among the draws: (draws + 1) x 2.5 %, the last of them being the bound.
    """
    ordered = np.sort(draws, axis=0)
    rank = max(1, int((len(ordered) + 1) * (100 - CONFIDENCE) / 200))
    return ordered[rank - 1], ordered[-rank]


def save_fits(fits: Sequence[Fit], path: Path) -> None:
    """Write fits as JSON."""
    write_json(path, [asdict(one) for one in fits])


def load_fits(path: Path) -> list[Fit]:
    """Read the file that ``save_fits`` wrote.

    Raises:
        UserError: the file is missing or holds something else.
    """
    data: Any = read_json(path)
    try:
        return _READER.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} is no file of pvs scaling-fit: {'.'.join(map(str, first['loc'])) or 'the top level'}: "
            f"{first['msg']}; fit again."
        ) from None


_READER = TypeAdapter(list[Fit])
