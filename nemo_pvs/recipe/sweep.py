"""The block ``learning_rate: {sweep: ...}``: peak learning rates to choose from."""

from __future__ import annotations

from pydantic import Field, model_validator

from nemo_pvs.recipe.fields import Block, Rate, Tokens


class Sweep(Block):
    """Peak learning rates, of which the one with the lowest validation loss after a training is chosen."""

    sweep: list[Rate] = Field(min_length=2)
    tokens: Tokens | None = Field(default=None, gt=0)
    """Training tokens of each candidate; by default the largest budget of the arms that use the rate."""

    @model_validator(mode="after")
    def _rates_differ(self) -> Sweep:
        if len(set(self.sweep)) < len(self.sweep):
            raise ValueError("a rate is given twice; leave one out")
        return self
