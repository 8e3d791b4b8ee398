"""A fitted law: parameters with calibrated intervals, errors on held-out points, and its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.bootstrap import CONFIDENCE, DRAWS, FEWEST_DRAWS, confidence_interval, draw, scatter
from nemo_pvs.scaling.chinchilla import Chinchilla
from nemo_pvs.scaling.estimate import Points, fit_parameters, predict, undetermined
from nemo_pvs.scaling.held_out import HeldOut, held_out, slope_difference
from nemo_pvs.scaling.law import Law, names
from nemo_pvs.scaling.p2 import P2
from nemo_pvs.scaling.per_run import PerRun
from nemo_pvs.scaling.series import LossSeries, warnings_of
from nemo_pvs.system.files import read_json, write_json

Form = Literal["p2", "chinchilla", "per-run"]
LAWS: dict[str, Law] = {P2.name: P2(), Chinchilla.name: Chinchilla(), PerRun.name: PerRun()}

_POINTS_A_PARAMETER = 3
_EDGE = 1e-4


@dataclass(frozen=True)
class Fit:
    """A law fitted to series, as plain data."""

    form: Form
    series: list[LossSeries]
    values: list[float]
    """Exponents, then coefficients, in the law's order; for parameters and tokens in billions."""
    draws: list[list[float]]
    """Bootstrap draws of ``values``, each fitted to losses drawn around the fitted law (``bootstrap.draw``)."""
    noise: list[float]
    """For each draw the standard deviation of ln(loss) with which its losses were drawn."""
    rmse: float
    """Nats per token, over the fitted points."""
    slope_difference: float | None
    """ASD, nats per billion tokens (``held_out.slope_difference``); None if no series has two points."""
    held_out: list[HeldOut]
    warnings: list[str]

    @property
    def name(self) -> str:
        """The name of its series, or the number of series."""
        return self.series[0].name if len(self.series) == 1 else f"{len(self.series)} series"

    @property
    def law(self) -> Law:
        """The fitted law."""
        return LAWS[self.form]

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters by name."""
        return dict(zip(names(self.law), self.values, strict=True))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each parameter."""
        low, high = confidence_interval(np.array(self.draws))
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names(self.law))}

    @property
    def scatter(self) -> float:
        """The standard deviation of ln(loss) around the law, corrected for degrees of freedom."""
        points = Points.of(self.series)
        return scatter(points, predict(self.law, np.array(self.values), points), len(self.values))

    @property
    def range(self) -> tuple[float, float]:
        """The fewest and the most tokens of any point."""
        tokens = [count for series in self.series for count in series.tokens]
        return min(tokens), max(tokens)


def check_tokenizers(series: Sequence[LossSeries]) -> None:
    """Refuse series whose tokenizers are known to differ.

    Raises:
        UserError: naming two of them.
    """
    first = next((run for run in series if run.tokenizer), None)
    for run in series:
        if first and run.tokenizer and run.tokenizer != first.tokenizer:
            raise UserError(
                f"{first.name} and {run.name} have different tokenizers, so their losses per token are not in the "
                "same unit; fit them separately, and do not compare them."
            )


def fit(
    form: Form,
    series: Sequence[LossSeries],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Fit:
    """Fit a law to series.

    Args:
        form: The law's name.
        series: One for ``per-run``, several for the others.
        draws: Bootstrap draws for the intervals. Losses are drawn as if points were independent; those of one training
            run are not quite, so its intervals are slightly too narrow.
        seed: Seed of the starts and draws.
        progress: Called with (draws done, their total).

    Raises:
        UserError: the series cannot determine the law's parameters, their tokenizers differ, or there are too few
            draws for an interval.
    """
    if draws < FEWEST_DRAWS:
        raise UserError(f"{draws} draws are too few for a {CONFIDENCE:.0f} % interval; use at least {FEWEST_DRAWS}.")
    if seed < 0:
        raise UserError(f"The seed {seed} is negative; give 0 or more.")
    check_tokenizers(series)
    law = LAWS[form]
    warnings = law.check(series)
    for run in series:
        warnings += warnings_of(run)
    points = Points.of(series)
    if len(points.tokens) < _POINTS_A_PARAMETER * len(names(law)):
        warnings.append(f"{len(points.tokens)} points for {len(names(law))} parameters: the intervals are rough")
    values = fit_parameters(law, points, seed=seed)
    for exponent, value in zip(law.exponents, values, strict=False):
        if min(value - exponent.low, exponent.high - value) < _EDGE:
            warnings.append(
                f"{exponent.name} is {value:.3g}, at the edge of its range: these losses hardly follow the law"
            )
    if free := undetermined(law, points, values):
        warnings.append(
            f"these points do not determine {', '.join(free)}: many values fit equally well, as the intervals show"
        )
    fitted = predict(law, values, points)
    noise, drawn = draw(law, points, values, draws, np.random.default_rng(seed), progress)
    return Fit(
        form,
        list(series),
        values.tolist(),
        drawn.tolist(),
        noise.tolist(),
        float(np.sqrt(np.mean((points.losses - fitted) ** 2))),
        slope_difference(law, values, series),
        held_out(law, series, draws=draws, seed=seed),
        warnings,
    )


def save_fits(fits: Sequence[Fit], path: Path) -> None:
    """Write fits as JSON."""
    write_json(path, [asdict(fit) for fit in fits])


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
            f"{path} is not a file of pvs scaling-fit: {'.'.join(map(str, first['loc'])) or 'the top level'}: "
            f"{first['msg']}; fit again."
        ) from None


_READER = TypeAdapter(list[Fit])
