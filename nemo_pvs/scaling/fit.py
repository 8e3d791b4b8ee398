"""A fitted law: parameters with bootstrap intervals, how well it meets points it has not seen, and its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.files import read_json, write_json
from nemo_pvs.scaling.chinchilla import Chinchilla
from nemo_pvs.scaling.estimate import Array, Points, estimate, polish, predict
from nemo_pvs.scaling.held_out import HeldOut, held_out, slope_difference
from nemo_pvs.scaling.law import Law, names
from nemo_pvs.scaling.p2 import P2
from nemo_pvs.scaling.per_run import PerRun
from nemo_pvs.scaling.series import Series, warnings_of

Form = Literal["p2", "chinchilla", "per-run"]
LAWS: dict[str, Law] = {P2.name: P2(), Chinchilla.name: Chinchilla(), PerRun.name: PerRun()}

_POINTS_A_PARAMETER = 3
_EDGE = 1e-4

DRAWS = 200
CONFIDENCE = 95.0
"""Per cent of the draws that lie in an interval."""


@dataclass(frozen=True)
class Fit:
    """A law fitted to series, as plain data."""

    form: Form
    series: list[Series]
    values: list[float]
    """Exponents, then coefficients, in the law's order; parameters and tokens in billions."""
    draws: list[list[float]]
    """The same from resampled residuals (bootstrap)."""
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
        """The interval of each parameter: percentiles of its draws."""
        low, high = percentiles(np.array(self.draws))
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names(self.law))}

    @property
    def residuals(self) -> Array:
        """ln(measured) - ln(fitted) of every point, as large as they would be without the fit's own freedom."""
        points = Points.of(self.series)
        raw = np.log(points.losses) - np.log(predict(self.law, np.array(self.values), points))
        return raw * math.sqrt(len(raw) / (len(raw) - len(self.values)))

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
        draws: of the bootstrap. Residuals are resampled as if points were independent; those of one training run are
            not quite, so its intervals are somewhat too narrow.
        seed: of the starts and draws.
        progress: called with draws done and in all.

    Raises:
        UserError: the series cannot determine the law's parameters.
    """
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
    result = Fit(
        form,
        list(series),
        values.tolist(),
        [],
        float(np.sqrt(np.mean((points.losses - fitted) ** 2))),
        slope_difference(law, values, series),
        held_out(law, series, seed=seed),
        warnings,
    )
    generator = np.random.default_rng(seed)
    for draw in range(draws):
        noise = generator.choice(result.residuals, len(fitted))
        drawn = Points(points.tokens, fitted * np.exp(noise), points.at)
        result.draws.append(polish(law, drawn, values)[1].tolist())
        if progress:
            progress(draw + 1, draws)
    return result


def percentiles(draws: Array) -> tuple[Array, Array]:
    """Return the bounds of the interval that has ``CONFIDENCE`` per cent of the draws; draws may be infinite."""
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0, method="inverted_cdf")
    return low, high


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
