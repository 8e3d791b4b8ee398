"""What Adapt-Pruner reads off a model at each iteration, and what all of it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_pvs.calibration.gradients import layer_taylor_scores
from nemo_pvs.calibration.taylor import METRICS
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import LayerwiseModel
from nemo_pvs.ledger.flops import calibration_flops
from nemo_pvs.pruning.structured.adapt_pruner import Measured


class LayerMeasure:
    """Measures layers and units by gradients, layer by layer from the checkpoint: no model in memory, no Megatron.

    ``calibration.gradients`` runs layers of any sizes, and in several ranks the same; its scores are those of
    Megatron's ranks.
    """

    def __init__(self, draw: Callable[[int], TokenSet], metric: str, compute: Mapping[str, Any]) -> None:
        """Prepare.

        Args:
            draw: Returns the text of each iteration, from 0.
            metric: Of ``calibration.taylor.METRICS``.
            compute: Where and how layers run, as ``layerwise.LayerwiseModel`` takes it.

        Raises:
            UserError: there is no such metric.
        """
        if metric not in METRICS:
            raise UserError(f"Unknown metric {metric!r}; choose {', '.join(METRICS)}.")
        self.tokens = 0
        """Read so far, repetitions counted."""
        self.flops = 0
        """Forward and back, so far."""
        self._draw = draw
        self._metric = metric
        self._compute = compute

    def __call__(self, source: WeightSource, iteration: int) -> Measured:
        """Measure a model on the text of an iteration."""
        tokens = self._draw(iteration)
        model = LayerwiseModel(source, **self._compute)
        layers, similarity = layer_taylor_scores(model, tokens)
        self.tokens += tokens.ids.numel()
        self.flops += calibration_flops(model.shape, tokens.ids.numel(), tokens.ids.shape[1], gradients=True)
        groups, ffn = ([scores[f"{site}.{self._metric}"] for scores in layers] for site in ("groups", "ffn"))
        return Measured(similarity, groups, ffn)
