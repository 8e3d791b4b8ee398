"""Series of losses: those of one training run, or of several runs of one model, with the properties of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.curve import Values


@dataclass(frozen=True)
class LossSeries:
    """Losses against training tokens.

    Raises:
        UserError: there are no points, or tokens, a loss or a size are not positive and finite.
    """

    name: str
    tokens: tuple[float, ...]
    """Training tokens of this model alone, ascending."""
    losses: tuple[float, ...]
    """Nats per token."""
    initialisation: Literal["pruned", "random"]
    parameters: int
    """Parameters of the trained model, without weights that a mask holds at zero."""
    parent_parameters: int | None = None
    parent_loss: float | None = None
    separate_runs: bool = False
    """Whether every point is the end of a separate run; otherwise all were measured during one run."""
    planned_tokens: float | None = None
    """Tokens at which the learning-rate schedule ends."""
    source: str = ""
    tokenizer: str | None = None
    """SHA-256 of the tokenizer whose tokens were counted; None if unknown."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise UserError(f"{self.name} has no validation loss after its warm-up; train it further.")
        for whose, size in (("", self.parameters), ("a parent of ", self.parent_parameters)):
            if size is not None and size < 1:
                raise UserError(f"{self.name} has {whose}{size:,} parameters; give a number above 0.")
        for tokens, loss in zip(self.tokens, self.losses, strict=True):
            if not (math.isfinite(loss) and loss > 0):
                raise UserError(
                    f"{self.name} has a loss of {loss} after {tokens:,.0f} tokens; a run that diverged cannot be "
                    "fitted, so leave it out."
                )
            if not (math.isfinite(tokens) and tokens > 0):
                raise UserError(f"{self.name} has a loss after {tokens} tokens; give tokens above 0.")

    @property
    def ratio(self) -> float | None:
        """The share of the parent's parameters that was removed; None without a parent."""
        return None if self.parent_parameters is None else 1 - self.parameters / self.parent_parameters

    @property
    def conditions(self) -> Conditions:
        """The properties of the model that a law may depend on."""
        values = (self.parameters, self.parent_parameters, self.ratio, self.parent_loss)
        return Conditions(*(math.nan if value is None else float(value) for value in values))

    @property
    def cut_short(self) -> bool:
        """Whether the run stopped before the end of its schedule, so that its last loss is not decayed."""
        return self.planned_tokens is not None and self.tokens[-1] < 0.99 * self.planned_tokens

    def where(self, kept: NDArray[np.bool_]) -> LossSeries | None:
        """Return the series with the points where ``kept`` is true; None if there are none."""
        if not kept.any():
            return None
        values = {**self.__dict__, "tokens": tuple(np.array(self.tokens)[kept].tolist())}
        return LossSeries(**{**values, "losses": tuple(np.array(self.losses)[kept].tolist())})


def warnings_of(series: LossSeries) -> list[str]:
    """Return warnings about a run whose points are not the ends of fully decayed runs, as scaling laws assume."""
    if series.cut_short:
        done = series.tokens[-1] / (series.planned_tokens or 1)
        return [f"{series.name} was cut short at {done:.0%} of its cosine schedule: its losses are not decayed"]
    if not series.separate_runs and series.planned_tokens is not None:
        return [f"{series.name} is one cosine run: its losses before the end are higher than those of shorter runs"]
    return []


class Conditions(NamedTuple):
    """Properties of a model that a law may depend on; floats, or arrays with one entry per point. NaN if unknown."""

    parameters: Values = np.nan
    """Parameters of the trained model, without weights that a mask holds at zero."""
    parent_parameters: Values = np.nan
    """N0: parameters before pruning."""
    ratio: Values = np.nan
    """rho: the share of all parameters that was removed."""
    parent_loss: Values = np.nan
    """L0: loss before pruning, nats per token."""
