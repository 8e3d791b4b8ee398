"""Greedy depth pruning: remove the layer whose removal raises the loss least, measure again, repeat.

SLEB (2402.09025) is this with the first and the last layer protected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.ledger.flops import greedy_scan_cost, sweep_flops, sweep_tokens
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Indices, Plan
from nemo_pvs.pruning.structured.depth import METHOD, layer_plan, unprotected
from nemo_pvs.pruning.structured.sweep import LayerSweep


@dataclass(frozen=True)
class GreedyScan:
    """Layers in order of removal, and the loss without each candidate at each step."""

    shape: Shape
    """The dense model."""
    model_fingerprint: str
    tokens: dict[str, Any]
    """Manifest of the token set."""
    removed: Indices
    """Layers in order of removal; a scan for k layers removes the first k of them."""
    losses: tuple[dict[int, float], ...]
    """For each step the loss (nats per token) without each candidate layer."""
    dense_loss: float
    layer_forwards: int
    """Number of passes of the whole token set through a decoder layer."""

    @property
    def models(self) -> int:
        """Models whose loss was measured: the dense one and every candidate of every step."""
        return 1 + sum(map(len, self.losses))

    @property
    def tokens_read(self) -> int:
        """Tokens that went through the dense model and through every candidate."""
        return sweep_tokens(self.tokens, self.models)

    @property
    def flops(self) -> int:
        """Forward FLOPs: the layers that were actually run, and the output head for every model."""
        return sweep_flops(self.shape, self.tokens, self.layer_forwards, self.models)

    @property
    def reference_layer_forwards(self) -> int:
        """Layer forwards if the dense model and every candidate ran from its first layer, as SLEB's code does."""
        layers = self.shape.layers
        return layers + sum(len(step) * (layers - removed - 1) for removed, step in enumerate(self.losses))

    def first(self, remove: int) -> GreedyScan:
        """Return the scan as it was after ``remove`` layers.

        Raises:
            UserError: this scan removed fewer layers.
        """
        if not 1 <= remove <= len(self.removed):
            raise UserError(f"This scan removed {len(self.removed)} layers, not {remove}; scan for more.")
        losses = self.losses[:remove]
        layers, first = self.shape.layers, min(self.losses[0])
        last = layers - first - len(self.losses[0])
        cost = greedy_scan_cost(layers, remove, protect_first=first, protect_last=last)
        return replace(self, removed=self.removed[:remove], losses=losses, layer_forwards=cost.layer_forwards)


def scan_greedy(
    source: WeightSource,
    tokens: TokenSet,
    remove: int,
    *,
    protect_first: int = 0,
    protect_last: int = 0,
    compute: Compute = ON_CPU,
    progress: Callable[[int, int], None] | None = None,
) -> GreedyScan:
    """Remove ``remove`` layers one by one, each time the one without which the loss is lowest; ties go to the first.

    Every step is one sweep over the remaining layers, in which all candidates share the layers before the removed one.
    The next step could reuse only the states before the removed layer, about 1 / L of the work, and they would have to
    be stored for the whole text, so steps share nothing.

    Args:
        source: The dense model.
        tokens: Text to predict.
        remove: Layers to remove (k), 1 to L - 1.
        protect_first: Layers at the input that are always kept; SLEB keeps 1.
        protect_last: Layers at the output that are always kept; SLEB keeps 1.
        compute: Where and how layers run.
        progress: Called with (layer forwards done, their total).

    Raises:
        UserError: ``remove`` is out of range, too few layers are unprotected, or a loss is not finite.
    """
    count = shape_of(source).layers
    free = unprotected(count, remove, protect_first, protect_last)
    forwards = greedy_scan_cost(count, remove, protect_first=protect_first, protect_last=protect_last).layer_forwards
    sweep = LayerSweep(
        source,
        tokens,
        compute,
        on_forward=progress and (lambda done: progress(round(done), forwards)),
    )
    layers = list(range(count))
    removed: list[int] = []
    steps: list[dict[int, float]] = []
    dense_loss = 0.0
    for step in range(remove):
        # One position fewer after each step; the protected layers keep their places.
        candidates = range(free.start, free.stop - step)
        losses, whole_loss = sweep.losses(layers, 1, candidates, whole=not removed)
        dense_loss = dense_loss if whole_loss is None else whole_loss
        steps.append({layers[start]: loss for start, loss in losses.items()})
        removed.append(min(steps[-1], key=steps[-1].__getitem__))
        layers.remove(removed[-1])
    return GreedyScan(
        shape=sweep.model.shape,
        model_fingerprint=fingerprint(source),
        tokens=tokens.manifest,
        removed=tuple(removed),
        losses=tuple(steps),
        dense_loss=dense_loss,
        layer_forwards=round(sweep.layer_forwards),
    )


def plan_greedy(scan: GreedyScan, search: str = "greedy") -> Plan:
    """Remove the layers that a greedy scan chose; use ``scan.first(k)`` for fewer of them.

    Args:
        scan: Result of ``scan_greedy``.
        search: Name of the search, ``greedy`` or ``sleb``.
    """
    provenance = {
        "model_fingerprint": scan.model_fingerprint,
        "tokens": scan.tokens,
        "settings": {"search": search, "removed": len(scan.removed)},
        "dense_loss": scan.dense_loss,
        "order": list(scan.removed),
        "losses": [losses[layer] for losses, layer in zip(scan.losses, scan.removed, strict=True)],
        "layer_forwards": scan.layer_forwards,
    }
    return layer_plan(scan.shape, scan.removed, METHOD, provenance)
