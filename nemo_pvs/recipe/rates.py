"""The key ``learning_rate``: one peak rate, one for each kind of initial weights, or rates to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from nemo_pvs.recipe.fields import Initialisation, Rate, RecipeBlock, Tokens


class Sweep(RecipeBlock):
    """Peak learning rates, of which the one with the lowest validation loss after a training is chosen."""

    sweep: list[Rate] = Field(min_length=2)
    tokens: Tokens | None = Field(default=None, gt=0)
    """Training tokens of each candidate; by default the largest budget of the arms that use the rate."""

    @model_validator(mode="after")
    def _rates_differ(self) -> Sweep:
        if len({f"{rate:g}" for rate in self.sweep}) < len(self.sweep):  # as their trials are named
            raise ValueError("a rate is given twice; leave one out")
        return self


class Rates(RecipeBlock):
    """Peak learning rates by initial weights."""

    pruned: Rate | Sweep
    random: Rate | Sweep


def _form(rate: Any) -> str:
    if isinstance(rate, Mapping):
        return "Sweep" if "sweep" in rate else "Rates"
    return type(rate).__name__ if isinstance(rate, (Sweep, Rates)) else "float"


LearningRate: TypeAlias = Annotated[
    Annotated[Rate, Tag("float")] | Annotated[Sweep, Tag("Sweep")] | Annotated[Rates, Tag("Rates")],
    Discriminator(_form),  # so that an error is about the form that was meant
]


def peak_of(rate: LearningRate, initialisation: Initialisation) -> float | Sweep:
    """Return the peak learning rate of an arm with these initial weights, or the rates to choose from."""
    return getattr(rate, initialisation) if isinstance(rate, Rates) else rate
