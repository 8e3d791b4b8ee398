"""Compare two checkpoints by their logits on real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.layerwise.model import Compute, LayerwiseModel


@dataclass(frozen=True)
class Agreement:
    """Differences between the logits of two models."""

    tokens: int
    max_difference: float
    """Largest absolute difference of a logit."""
    mean_difference: float
    """Mean absolute difference of the logits."""
    top1: float
    """Share of the tokens after which both models predict the same next token."""

    def __str__(self) -> str:
        if self.max_difference == 0:
            return f"equal logits on {self.tokens:,} tokens"
        return (
            f"logits on {self.tokens:,} tokens that differ by at most {self.max_difference:.2g}, "
            f"{self.mean_difference:.2g} on average; {self.top1:.2%} of the predictions are the same"
        )


def compare_logits(
    one: WeightSource,
    other: WeightSource,
    ids: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Agreement:
    """Run both models on the same text, one layer at a time.

    Args:
        one: A model.
        other: A model with the same vocabulary; its architecture may differ.
        ids: Token ids [N, S].
        dtype: Compute dtype of both.
        progress: Called with (layers done, their total).

    Raises:
        UserError: the text does not fit a model.
    """
    models = [LayerwiseModel(source, Compute(dtype=dtype)) for source in (one, other)]
    total = sum(model.shape.layers for model in models)
    done = 0
    states = []
    for model in models:
        hidden = model.embed(ids)
        for index in range(model.shape.layers):
            model.run_layer(model.layer(index), hidden)
            done += 1
            if progress:
                progress(done, total)
        states.append(hidden)
    largest, summed, same, count = 0.0, 0.0, 0, 0
    for a, b in zip(*(model.logits(hidden) for model, hidden in zip(models, states, strict=True)), strict=True):
        difference = (a - b).abs()
        largest = max(largest, float(difference.max()))
        summed += float(difference.sum(dtype=torch.float64))
        same += int((a.argmax(dim=-1) == b.argmax(dim=-1)).sum())
        count += len(a)
    return Agreement(count, largest, summed / (count * models[0].shape.vocab), same / count)
