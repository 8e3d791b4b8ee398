"""Adapt-Pruner: prune in small steps by Taylor importance, most in layers that change their input least (2502.03460).

One call is one round: it prunes a model to at most a given number of parameters. ``nemo_pvs.planning.rounds`` plans
the training between rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from nemo_pvs.calibration.gradients import layer_taylor_scores
from nemo_pvs.calibration.taylor import METRICS
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute, LayerwiseModel
from nemo_pvs.ledger.flops import calibration_flops
from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Indices, Plan
from nemo_pvs.pruning.structured.width import most_important

_MOST = 0.99
"""Largest sparsity of a layer."""
_GUARD = 1e-9
"""Against rounding: 100 * (1 - 0.06) must not become 93."""
_HALVINGS = 40
"""Bisection steps for the share of the last iteration's step that just reaches the target."""


@dataclass(frozen=True)
class AdaptPrunerSettings:
    """How a round removes units, regardless of their scores. The defaults are those of the published scripts."""

    iterations: int = 50
    """T: each iteration removes on average 1 / T of the round's starting model, so T iterations would remove all."""
    amplitude: float = 0.02
    """A: how much less the most important layer's sparsity grows than the average at each iteration."""
    metric: str = "param_first"
    """One of ``calibration.taylor.METRICS``."""
    ffn_multiple: int = 1
    """FFN channels are removed from each layer in multiples of this."""
    kv_groups_multiple: int = 1
    """KV groups are removed from each layer in multiples of this."""
    compat: bool = False
    """Take the last iteration's full step, as the published script does, which overshoots the target by up to 1 / T;
    and round counts without a guard, so that half of 2,560 channels may be 1,279 after sparsities are summed."""

    def check(self) -> None:
        """Raise UserError unless the numbers make sense."""
        if self.iterations < 1 or min(self.ffn_multiple, self.kv_groups_multiple) < 1:
            raise UserError("Adapt-Pruner's iterations and multiples must be at least 1; raise the one that is less.")
        if self.amplitude < 0:
            raise UserError(f"An amplitude of {self.amplitude:g} would prune important layers most; choose 0 or more.")


class MeasuredImportance(NamedTuple):
    """What one iteration measures of a model."""

    similarity: torch.Tensor
    """Mean over tokens of the cosine between each layer's input and output [L]."""
    groups: list[torch.Tensor]
    """For each layer, the importance of its KV groups [G of the layer]."""
    ffn: list[torch.Tensor]
    """For each layer, the importance of its FFN channels [f of the layer]."""


def layer_importance(similarity: torch.Tensor) -> torch.Tensor:
    """Return each layer's importance (I), from -1 to 1 with mean 0 [L]: its dissimilarity, centred and scaled.

    With the cosines c between inputs and outputs (``similarity`` [L]) it is ``(mean(c) - c) / max |mean(c) - c|``, and
    0 if all layers are equally similar.
    """
    importance = similarity.double().neg()
    importance -= importance.mean()
    largest = importance.abs().max()
    return importance / largest if largest > 0 else importance


def next_sparsity(sparsity: torch.Tensor, importance: torch.Tensor, settings: AdaptPrunerSettings) -> torch.Tensor:
    """Return each layer's sparsity after one more iteration [L]: ``clip(s + 1 / T - A I, 0, 0.99)``.

    s (``sparsity``) and I (``importance``) are [L]; T (``iterations``) and A (``amplitude``) are settings.

    A layer's sparsity may fall, but removed units are not restored; the layer loses no more until its sparsity exceeds
    its earlier maximum.
    """
    return (sparsity + 1 / settings.iterations - settings.amplitude * importance).clamp(0, _MOST)


def kept_sizes(
    start: Shape, current: Shape, sparsity: torch.Tensor, settings: AdaptPrunerSettings
) -> list[LayerSizes]:
    """Return the sizes of each layer at a sparsity relative to the round's start.

    Of ``n`` FFN channels or key channels at the start ``int(n (1 - s))`` are kept; a KV group is removed when as many
    key channels as it has are due.

    Args:
        start: Shape at the round's start.
        current: Shape now.
        sparsity: Sparsity of each layer [L].
        settings: Multiples and rounding.

    Raises:
        UserError: a layer would be left without KV groups or FFN channels.
    """
    sizes = []
    for layer, share in enumerate(sparsity.tolist()):
        first, now = start.at(layer), current.at(layer)
        group, guard = start.head_dim, 0.0 if settings.compat else _GUARD
        ffn = _left(first.ffn, now.ffn, share, settings.ffn_multiple, guard)
        keys = _left(first.kv_groups * group, now.kv_groups * group, share, settings.kv_groups_multiple * group, guard)
        if ffn < 1 or keys < group:
            raise UserError(
                f"Adapt-Pruner would prune layer {layer} to nothing (sparsity {share:.2f}); choose a lower ratio, "
                "a lower amplitude, or more stages."
            )
        sizes.append(LayerSizes(ffn, keys // group * first.heads_per_group, keys // group))
    return sizes


def plan_adapt_pruner(
    source: WeightSource,
    parameters: int,
    measure: Callable[[WeightSource, int], MeasuredImportance],
    settings: AdaptPrunerSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Prune a model in small steps until it has at most ``parameters`` parameters.

    Each iteration measures the remaining model, raises the layers' sparsities, and removes the least important units
    of each layer. The last step is shortened to what the target needs, so that models get comparable sizes.

    Args:
        source: The model, with even or uneven layers.
        parameters: Parameters to keep at most, including embeddings (tied ones counted once).
        measure: Called with the remaining model and the iteration's number, from 0.
        settings: How units are removed.
        progress: Called with (parameters removed, parameters to remove).

    Raises:
        UserError: the settings are invalid, the model is already small enough, a layer would be pruned to nothing, or
            the iterations end before the target is reached.
    """
    settings = settings or AdaptPrunerSettings()
    settings.check()
    start = shape_of(source)
    if start.parameters <= parameters:
        raise UserError(f"The model has {start.parameters:,} parameters, no more than {parameters:,}; ask for fewer.")
    sparsity = torch.zeros(start.layers, dtype=torch.float64)
    plan = _plan(start, [_everything(start, layer) for layer in range(start.layers)])
    history: list[list[float]] = []
    while plan.target.parameters > parameters and len(history) < settings.iterations:
        left = PrunedSource(source, plan)
        measured = measure(left, len(history))
        step = next_sparsity(sparsity, layer_importance(measured.similarity), settings) - sparsity
        share = 1.0 if settings.compat else _share_needed(start, plan.target, sparsity, step, parameters, settings)
        sparsity = sparsity + share * step
        sizes = kept_sizes(start, plan.target, sparsity, settings)
        plan = _plan(start, [_best(plan, layer, size, measured) for layer, size in enumerate(sizes)])
        history.append(sparsity.tolist())
        if progress:
            removed = min(start.parameters - plan.target.parameters, start.parameters - parameters)
            progress(removed, start.parameters - parameters)
    if plan.target.parameters > parameters:
        raise UserError(
            f"Adapt-Pruner's {settings.iterations} iterations ended at {plan.target.parameters:,} parameters, above "
            f"{parameters:,}; choose a lower ratio or more stages."
        )
    provenance = {
        "model_fingerprint": fingerprint(source),
        "settings": {**asdict(settings), "parameters": parameters},
        "sparsities": history,
    }
    return _plan(start, list(zip(plan.keep_kv_groups, plan.keep_ffn, strict=True)), provenance)


def _left(first: int, now: int, sparsity: float, multiple: int, guard: float) -> int:
    """Return how many of ``now`` channels are kept, of ``first`` at the start; they are removed in multiples."""
    due = now - int(first * (1 - min(sparsity, _MOST)) + guard)
    return now - max(0, due) // multiple * multiple


def _share_needed(
    start: Shape,
    current: Shape,
    sparsity: torch.Tensor,
    step: torch.Tensor,
    parameters: int,
    settings: AdaptPrunerSettings,
) -> float:
    """Return the least share of a step that reaches the target, or 1 if the full step does not.

    Layers only lose units as the share grows, so bisection finds it.
    """

    def reaches(share: float) -> bool:
        try:
            sizes = kept_sizes(start, current, sparsity + share * step, settings)
        except UserError:  # the target may be reached before a layer is pruned to nothing
            return True
        return start.with_layers(sizes).parameters <= parameters

    if not reaches(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _everything(shape: Shape, layer: int) -> tuple[Indices, Indices]:
    sizes = shape.at(layer)
    return tuple(range(sizes.kv_groups)), tuple(range(sizes.ffn))


def _best(plan: Plan, layer: int, sizes: LayerSizes, measured: MeasuredImportance) -> tuple[Indices, Indices]:
    """Return the groups and channels of a layer that are still kept, as indices at the round's start."""
    groups, ffn = plan.keep_kv_groups[layer], plan.keep_ffn[layer]
    return (
        tuple(groups[position] for position in most_important(measured.groups[layer], sizes.kv_groups)),
        tuple(ffn[position] for position in most_important(measured.ffn[layer], sizes.ffn)),
    )


def _plan(start: Shape, kept: list[tuple[Indices, Indices]], provenance: Mapping[str, object] | None = None) -> Plan:
    groups, ffn = zip(*kept, strict=True)
    sizes = []
    for layer, (kept_groups, kept_ffn) in enumerate(kept):
        heads = len(kept_groups) * start.at(layer).heads_per_group
        sizes.append(LayerSizes(len(kept_ffn), heads, len(kept_groups)))
    return Plan(
        method="adapt-pruner",
        parent=start,
        target=start.with_layers(sizes),
        keep_layers=tuple(range(start.layers)),
        keep_hidden=tuple(range(start.hidden)),
        keep_ffn=ffn,
        keep_kv_groups=groups,
        provenance=provenance or {},
    )


class LayerMeasure:
    """Measures layers and units by gradients, layer by layer from the checkpoint, without Megatron.

    ``calibration.gradients`` handles uneven layers and any number of ranks; its scores equal those measured in
    Megatron.
    """

    def __init__(self, draw: Callable[[int], TokenSet], metric: str, compute: Compute) -> None:
        """Prepare.

        Args:
            draw: Returns the text of an iteration, from 0.
            metric: One of ``calibration.taylor.METRICS``.
            compute: Where and how layers run.

        Raises:
            UserError: the metric is unknown.
        """
        if metric not in METRICS:
            raise UserError(f"Unknown metric {metric!r}; choose {', '.join(METRICS)}.")
        self.tokens = 0
        """Tokens read so far, counted each time they are read."""
        self.flops = 0
        """FLOPs of forward and backward passes so far."""
        self._draw = draw
        self._metric = metric
        self._compute = compute

    def __call__(self, source: WeightSource, iteration: int) -> MeasuredImportance:
        """Measure a model on the iteration's text."""
        tokens = self._draw(iteration)
        model = LayerwiseModel(source, self._compute)
        layers, similarity = layer_taylor_scores(model, tokens)
        self.tokens += tokens.ids.numel()
        self.flops += calibration_flops(model.shape, tokens.ids.numel(), tokens.ids.shape[1], gradients=True)
        groups, ffn = ([scores[f"{site}.{self._metric}"] for scores in layers] for site in ("groups", "ffn"))
        return MeasuredImportance(similarity, groups, ffn)
