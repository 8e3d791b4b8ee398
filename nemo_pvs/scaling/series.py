"""Series: the losses of one training run, or of a ladder of runs, and the model that they belong to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.curve import Values


@dataclass(frozen=True)
class Series:
    """Losses against training tokens.

    Raises:
        UserError: there is no point, or one that is no number of tokens above 0 or no finite loss above 0.
    """

    name: str
    tokens: tuple[float, ...]
    """Training tokens of this model alone, ascending."""
    losses: tuple[float, ...]
    """Nats per token."""
    initialisation: Literal["pruned", "random"]
    parameters: int
    """Of the trained model; weights that a mask holds at zero do not count."""
    parent_parameters: int | None = None
    parent_loss: float | None = None
    separate_runs: bool = False
    """Every point is the end of a run of its own; else they were measured on the way of one run."""
    planned_tokens: float | None = None
    """Where the learning rate's schedule ends."""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise UserError(f"{self.name} has no validation loss after its warm-up; train it further.")
        for tokens, loss in zip(self.tokens, self.losses, strict=True):
            if not (math.isfinite(loss) and loss > 0):
                raise UserError(
                    f"{self.name} has a loss of {loss} after {tokens:,.0f} tokens; a run that diverged cannot be "
                    "fitted, leave it out."
                )
            if not (math.isfinite(tokens) and tokens > 0):
                raise UserError(f"{self.name} has a loss after {tokens} tokens; give tokens above 0.")

    @property
    def ratio(self) -> float | None:
        """The share of the parent's parameters that is gone; None without a parent."""
        return None if self.parent_parameters is None else 1 - self.parameters / self.parent_parameters

    @property
    def conditions(self) -> Conditions:
        """What a law may know about the model."""
        return Conditions(
            *(
                math.nan if value is None else float(value)
                for value in (self.parameters, self.parent_parameters, self.ratio, self.parent_loss)
            )
        )

    @property
    def cut_short(self) -> bool:
        """Whether the run stopped before its schedule did: its last loss was not decayed."""
        return self.planned_tokens is not None and self.tokens[-1] < 0.99 * self.planned_tokens

    def where(self, kept: NDArray[np.bool_]) -> Series | None:
        """Return the series with some of its points; None if none is left."""
        if not kept.any():
            return None
        values = {**self.__dict__, "tokens": tuple(np.array(self.tokens)[kept].tolist())}
        return Series(**{**values, "losses": tuple(np.array(self.losses)[kept].tolist())})


def warnings_of(series: Series) -> list[str]:
    """Return what makes a run's points less than a scaling law wants: each the end of a decayed run."""
    if series.cut_short:
        done = series.tokens[-1] / (series.planned_tokens or 1)
        return [f"{series.name} was cut short at {done:.0%} of its cosine schedule: its losses are not decayed"]
    if not series.separate_runs and series.planned_tokens is not None:
        return [f"{series.name} is one cosine run: its losses before the end are higher than those of shorter runs"]
    return []


class Conditions(NamedTuple):
    """What a law may know about a model; floats, or arrays with an entry a point. NaN where it is not known."""

    parameters: Values = np.nan
    """Of the trained model, weights that a mask holds at zero not counted."""
    parent_parameters: Values = np.nan
    """N0: before pruning."""
    ratio: Values = np.nan
    """rho: the share of all parameters that was removed."""
    parent_loss: Values = np.nan
    """L0: nats per token, before pruning."""
