"""Depth pruning: remove the layers whose removal raises the loss least (Minitron, 2407.14679)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.ledger.flops import sweep_flops, sweep_tokens, window_scan_cost
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Plan, whole_layers
from nemo_pvs.pruning.structured.sweep import LayerSweep

METHOD = "minitron-depth"
SEARCHES = ("contiguous", "greedy", "sleb", "individual")
"""Searches by loss: ``scan_windows``, ``greedy.scan_greedy`` (two settings), and ``scan_windows`` of one layer."""


@dataclass(frozen=True)
class Scan:
    """The loss of a model without each run of ``removed`` consecutive layers."""

    shape: Shape
    """The dense model."""
    model_fingerprint: str
    tokens: dict[str, Any]
    """Manifest of the token set."""
    removed: int
    losses: tuple[float, ...]
    """Loss (nats per token) without layers i to i + removed - 1, for i = 0 .. L - removed."""
    dense_loss: float
    layer_forwards: int
    """Number of passes of the whole token set through a decoder layer."""

    @property
    def start(self) -> int:
        """First layer of the run with the lowest loss; ties go to the first."""
        return self.losses.index(min(self.losses))

    @property
    def nearest_start(self) -> int:
        """First layer of the run whose perplexity is nearest to the dense model's: llm-pruning-collection's choice.

        This rule can reject a candidate that is better than the dense model.
        """
        return self.distances.index(min(self.distances))

    @property
    def distances(self) -> list[float]:
        """Distance of each candidate's perplexity from the dense model's."""
        dense = _perplexity(self.dense_loss)
        return [abs(_perplexity(loss) - dense) for loss in self.losses]

    @property
    def models(self) -> int:
        """Models whose loss was measured: the dense one and every candidate."""
        return len(self.losses) + 1

    @property
    def tokens_read(self) -> int:
        """Tokens that went through the dense model and through every candidate."""
        return sweep_tokens(self.tokens, self.models)

    @property
    def flops(self) -> int:
        """Forward FLOPs of the scan: the layers that were actually run, and the output head for every model."""
        return sweep_flops(self.shape, self.tokens, self.layer_forwards, self.models)

    @property
    def reference_layer_forwards(self) -> int:
        """Layer forwards of a scan that runs every model from its first layer, as llm-pruning-collection does.

        The dense model (L layers), L' + 1 candidates of L' layers, and the winner once more.
        """
        kept = self.shape.layers - self.removed
        return self.shape.layers + (kept + 2) * kept


def scan_windows(
    source: WeightSource,
    tokens: TokenSet,
    remove: int,
    *,
    compute: Compute = ON_CPU,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Measure the loss without each run of ``remove`` layers, in one sweep over the layers (``LayerSweep``).

    Args:
        source: The dense model.
        tokens: Text to predict.
        remove: Layers to remove (k), 1 to L - 1.
        compute: Where and how layers run.
        progress: Called with (layer forwards done, their total).

    Raises:
        UserError: ``remove`` is out of range, or a loss is not finite.
    """
    layers = shape_of(source).layers
    check_removal(layers, remove)
    starts = range(layers - remove + 1)
    forwards = window_scan_cost(layers, remove).layer_forwards
    sweep = LayerSweep(
        source,
        tokens,
        compute,
        on_forward=progress and (lambda done: progress(round(done), forwards)),
    )
    losses, dense_loss = sweep.losses(range(layers), remove, starts)
    assert dense_loss is not None
    return Scan(
        shape=sweep.model.shape,
        model_fingerprint=fingerprint(source),
        tokens=tokens.manifest,
        removed=remove,
        losses=tuple(losses.values()),
        dense_loss=dense_loss,
        layer_forwards=round(sweep.layer_forwards),
    )


def plan_depth(scan: Scan, *, compat: bool = False, protect_first: int = 0, protect_last: int = 0) -> Plan:
    """Remove the run of layers with the lowest loss; ties go to the first.

    Args:
        scan: Result of ``scan_windows``.
        compat: Take the run whose perplexity is nearest to the dense model's instead, as llm-pruning-collection does.
        protect_first: Layers at the input that are always kept.
        protect_last: Layers at the output that are always kept.

    Raises:
        UserError: fewer layers are unprotected than the run has.
    """
    starts = unprotected_starts(scan.shape.layers, scan.removed, protect_first, protect_last)
    start = min(starts, key=(scan.distances if compat else scan.losses).__getitem__)
    run = range(start, start + scan.removed)
    settings = {"search": "contiguous", "removed": len(run), "compat": compat, **ends(protect_first, protect_last)}
    return layer_plan(scan.shape, run, METHOD, _provenance(scan, **settings))


def plan_individual(scan: Scan, remove: int, *, protect_first: int = 0, protect_last: int = 0) -> Plan:
    """Remove the layers whose individual removal raises the loss least (Shortened LLaMA, 2402.02834).

    Args:
        scan: A scan of single layers (``removed`` is 1).
        remove: Layers to remove (k).
        protect_first: Layers at the input that are always kept; Shortened LLaMA keeps 4 when it scores by weights.
        protect_last: Layers at the output that are always kept; Shortened LLaMA keeps 2 when it scores by weights.

    Raises:
        UserError: fewer than ``remove`` layers are unprotected, or the scan is not of single layers.
    """
    if scan.removed != 1:
        raise UserError(f"Choosing single layers needs a scan of single layers, not of runs of {scan.removed}.")
    free = unprotected(scan.shape.layers, remove, protect_first, protect_last)
    chosen = sorted(free, key=lambda layer: scan.losses[layer])[:remove]
    settings = {"removed": remove, "protect_first": protect_first, "protect_last": protect_last}
    return layer_plan(scan.shape, chosen, METHOD, _provenance(scan, search="individual", **settings))


def layers_to_remove(parent: Shape, target: Shape) -> int:
    """Return how many layers to remove from ``parent`` to reach ``target``.

    Raises:
        UserError: the two differ in width.
    """
    if parent.replace(layers=target.layers) != target:
        raise UserError(
            f"Depth pruning removes whole layers, but the target [{target}] differs from [{parent}] in width; "
            "prune the width in a separate step."
        )
    return parent.layers - target.layers


def check_removal(layers: int, remove: int) -> None:
    """Raise UserError unless at least one layer is removed and one is kept."""
    if not 1 <= remove < layers:
        raise UserError(f"Cannot remove {remove} of {layers} layers; choose from 1 to {layers - 1}.")


def unprotected(layers: int, remove: int, protect_first: int, protect_last: int) -> range:
    """Return the layers that may be removed.

    Raises:
        UserError: there are fewer than ``remove`` of them, or ``remove`` is out of range.
    """
    check_removal(layers, remove)
    if min(protect_first, protect_last) < 0 or layers - protect_first - protect_last < remove:
        raise UserError(
            f"Cannot remove {remove} of {layers} layers and keep the first {protect_first} and the last "
            f"{protect_last}; protect fewer layers."
        )
    return range(protect_first, layers - protect_last)


def unprotected_starts(layers: int, remove: int, protect_first: int, protect_last: int) -> range:
    """Return the first layers of all runs of ``remove`` layers without a protected one.

    Raises:
        UserError: there is no such run, or ``remove`` is out of range.
    """
    free = unprotected(layers, remove, protect_first, protect_last)
    return range(free.start, free.stop - remove + 1)


def ends(protect_first: int, protect_last: int) -> dict[str, int]:
    """Return the protected layers as settings of a plan; nothing if none are, as in plans of earlier versions."""
    protected = {"protect_first": protect_first, "protect_last": protect_last}
    return protected if any(protected.values()) else {}


def layer_plan(shape: Shape, remove: Sequence[int], method: str, provenance: dict[str, Any]) -> Plan:
    """Return the plan that removes some layers and keeps everything in the others."""
    kept = [layer for layer in range(shape.layers) if layer not in set(remove)]
    target = shape.with_layers(shape.layer_sizes[layer] for layer in kept)
    return Plan(method=method, parent=shape, target=target, **whole_layers(shape, kept), provenance=provenance)


def _provenance(scan: Scan, **settings: Any) -> dict[str, Any]:
    return {
        "model_fingerprint": scan.model_fingerprint,
        "tokens": scan.tokens,
        "settings": settings,
        "dense_loss": scan.dense_loss,
        "losses": list(scan.losses),
        "layer_forwards": scan.layer_forwards,
    }


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # larger exponents overflow
