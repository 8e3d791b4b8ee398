"""How many attention units and FFN channels each layer keeps at a ratio, by FLAP's rules (2312.11983).

A unit is a KV group with its query heads, or an FFN channel (neuron). Instead of KV groups the units of attention can
be query heads: one head of every KV group of a layer, because all groups must keep the same number. Ratios are shares
of the weights in the matrices of the decoder layers (``Shape.matrix_parameters``), without norms, biases, embedding
and output head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import LayerSizes, Shape

STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
"""FLAP's names: uniform over layers (UL) or all layers compared (AL); the same share of groups and of neurons (UM), a
given number of groups and neurons for the rest of the budget (MM), or groups and neurons compared (AM)."""

ATTENTION_UNITS = ("groups", "heads")

# Rounding guard: 0.29 * 100 must not become 28.
_GUARD = 1e-9


@dataclass(frozen=True)
class UnitRules:
    """How many units to keep, regardless of their scores."""

    ratio: float
    """Share of the weights to remove."""
    structure: str = "UL-UM"
    remove_groups: int | None = None
    """KV groups to remove per layer (on average in AL-MM); by default the ratio of them, rounded down. Not for UL-UM
    and AL-AM."""
    uniform: bool = False
    """Keep the same counts in every layer, whatever the structure."""
    ffn_multiple: int = 1
    """Keep FFN channels of each layer in multiples of this, rounded to the nearest, and at least one multiple."""
    kv_groups_multiple: int = 1
    """The same for KV groups."""
    compat: bool = False
    """Count a KV group as one head of multi-head attention, as FLAP's published script does."""
    round_kept: bool = False
    """In UL-UM round down the number of kept units, as LLM-Pruner's code does (``_kept_counts``), not that of removed
    units, as FLAP's does."""
    protect_first: int = 0
    """Layers at the input that keep all units. In UL-UM the ratio applies to each other layer, as in LLM-Pruner;
    otherwise the others lose more, so that the whole model reaches the ratio."""
    protect_last: int = 0
    """The same at the output."""
    attention_unit: str = "groups"
    """What is removed from attention: ``groups``, KV groups with their query heads, or ``heads``, one query head of
    every KV group at a time."""

    def units(self, shape: Shape) -> int:
        """Return how many attention units a layer has: KV groups, or query heads of a group."""
        return shape.heads_per_group if self.attention_unit == "heads" else shape.kv_groups

    def sizes(self, shape: Shape, units: int, ffn: int) -> LayerSizes:
        """Return the sizes of a layer that keeps these numbers of attention units and neurons."""
        if self.attention_unit == "heads":
            return LayerSizes(ffn, units * shape.kv_groups, shape.kv_groups)
        return LayerSizes(ffn, units * shape.heads_per_group, units)

    def within_layers(self, method: str) -> UnitRules:
        """Return the rules; raise UserError if they compare layers, for methods whose scores are not comparable."""
        if self.structure not in {"UL-UM", "UL-MM"}:
            raise UserError(f"The scores of {method} are not comparable between layers; choose UL-UM or UL-MM.")
        return self

    def check(self, shape: Shape) -> None:
        """Raise UserError unless the rules are valid for a model."""
        if self.structure not in STRUCTURES:
            raise UserError(f"Unknown structure {self.structure!r}; choose {', '.join(STRUCTURES)}.")
        if not 0 < self.ratio < 1:
            raise UserError(f"The ratio {self.ratio} removes nothing or everything; choose one between 0 and 1.")
        if self.remove_groups is not None and not 0 <= self.remove_groups < shape.kv_groups:
            raise UserError(
                f"Cannot remove {self.remove_groups} of {shape.kv_groups} KV groups; "
                f"choose from 0 to {shape.kv_groups - 1}."
            )
        if self.remove_groups is not None and self.structure in {"UL-UM", "AL-AM"}:
            raise UserError(f"{self.structure} chooses the number of KV groups itself; leave remove_groups out.")
        for name, multiple, size in (
            ("ffn_multiple", self.ffn_multiple, shape.ffn),
            ("kv_groups_multiple", self.kv_groups_multiple, shape.kv_groups),
        ):
            if not 1 <= multiple <= size:
                raise UserError(f"{name} is {multiple}, but the model has {size}; choose from 1 to {size}.")
        self._check_heads(shape)
        self._check_protected(shape)

    def _check_heads(self, shape: Shape) -> None:
        if self.attention_unit not in ATTENTION_UNITS:
            raise UserError(f"Unknown attention_unit {self.attention_unit!r}; choose {', '.join(ATTENTION_UNITS)}.")
        if self.attention_unit == "groups":
            return
        if shape.heads_per_group == 1:
            raise UserError("Each KV group of this model has only one query head; choose attention_unit groups.")
        if self.remove_groups is not None or self.kv_groups_multiple > 1:
            raise UserError(
                "attention_unit heads keeps all KV groups; leave remove_groups and kv_groups_multiple out."
            )
        if self.compat:
            raise UserError("The published script removes whole KV groups; leave compat out, or attention_unit.")

    def _check_protected(self, shape: Shape) -> None:
        protected = self.protect_first + self.protect_last
        if min(self.protect_first, self.protect_last) < 0 or protected >= shape.layers:
            raise UserError(f"Cannot protect {protected} of {shape.layers} layers; some must be left to prune.")
        if protected and self.uniform:
            raise UserError("Protected layers keep their sizes, so not all can be uniform; leave out one of the two.")
        if self.structure != "UL-UM" and self.ratio * shape.layers >= shape.layers - protected:
            raise UserError(
                f"A ratio of {self.ratio} cannot be removed from {shape.layers - protected} of {shape.layers} layers; "
                "choose a lower one, or protect fewer."
            )

    def of_the_rest(self, shape: Shape) -> tuple[Shape, UnitRules]:
        """Return the shape of the unprotected layers alone, and the rules that apply to them."""
        rest = shape.layers - self.protect_first - self.protect_last
        share = 1.0 if self.structure == "UL-UM" else shape.layers / rest
        return shape.replace(layers=rest), replace(self, ratio=self.ratio * share, protect_first=0, protect_last=0)


@dataclass(frozen=True)
class _Budget:
    """Weights to remove, in neurons: a neuron is a row of gate and of up and a column of down, 3 d weights."""

    shape: Shape
    rules: UnitRules

    @property
    def units(self) -> int:
        """Attention units of a layer."""
        return self.rules.units(self.shape)

    @property
    def unit(self) -> float:
        """Weights of an attention unit in neurons.

        (2 g + 2) h / 3 for a KV group, in compat ``4 h / 3``, rounded down; 2 G h / 3 for one head of every group.
        """
        shape = self.shape
        if self.rules.compat:
            return 4 * shape.head_dim // 3
        if self.rules.attention_unit == "heads":
            return 2 * shape.kv_groups * shape.head_dim / 3
        return (2 * shape.heads_per_group + 2) * shape.head_dim / 3

    @property
    def fixed(self) -> float:
        """Weights of all layers' keys and values in neurons, if they belong to no unit: 2 G h / 3 per layer."""
        return self.shape.layers * self.unit if self.rules.attention_unit == "heads" else 0.0

    def neurons(self, units: int) -> float:
        """Return how many neurons to remove from all layers together in addition to ``units`` attention units."""
        shape, ratio = self.shape, self.rules.ratio
        if self.rules.compat:  # attention with 4 d^2 weights per layer, of which a query head has 4 d h
            weights = shape.layers * shape.hidden * (3 * shape.ffn + 4 * shape.hidden)
            units_weights = 4 * shape.hidden * shape.head_dim * shape.heads_per_group * units
            return (ratio * weights - units_weights) / (3 * shape.hidden)
        return ratio * shape.matrix_parameters / (3 * shape.hidden) - units * self.unit


def unit_counts(
    attention: torch.Tensor, ffn: torch.Tensor, shape: Shape, rules: UnitRules
) -> tuple[list[int], list[int]]:
    """Return how many attention units and how many neurons each layer keeps.

    Args:
        attention: Score of each attention unit [L, G] or [L, g]; comparable between layers if the structure compares
            them.
        ffn: Score of each neuron [L, f].
        shape: The parent's shape, with even layers.
        rules: How many units to keep.

    Raises:
        UserError: the rules are invalid for this model, or leave a layer without attention units or neurons.
    """
    rules.check(shape)
    budget = _Budget(*rules.of_the_rest(shape))
    rest = slice(rules.protect_first, shape.layers - rules.protect_last)
    kept_units, kept_ffn = _settle(*_counts(attention[rest], ffn[rest], budget), budget)

    def with_protected(counts: list[int], size: int) -> list[int]:
        return [size] * rules.protect_first + counts + [size] * rules.protect_last

    return with_protected(kept_units, rules.units(shape)), with_protected(kept_ffn, shape.ffn)


def _counts(attention: torch.Tensor, ffn: torch.Tensor, budget: _Budget) -> tuple[list[int], list[int]]:
    """Return how many attention units and neurons each layer keeps, before rounding to multiples."""
    rules, shape = budget.rules, budget.shape
    layers = shape.layers
    if rules.structure == "AL-AM":
        return _compare_all(attention, ffn, budget)
    if rules.structure == "AL-MM":
        removed = _removed_units(budget, layers)
        return (
            _best_overall(attention, attention.numel() - removed, rules.kv_groups_multiple),
            _best_overall(ffn, ffn.numel() - _neurons(budget, removed, 1), rules.ffn_multiple),
        )
    if rules.structure == "UL-UM" and rules.round_kept:
        kept_units, kept_ffn = _kept_counts(budget)
        return [kept_units] * layers, [kept_ffn] * layers
    removed = _removed_units(budget, 1)
    if rules.structure == "UL-UM":
        neurons = int(rules.ratio * shape.ffn + _GUARD)
    else:
        neurons = _neurons(budget, layers * removed, layers)
    return [budget.units - removed] * layers, [shape.ffn - neurons] * layers


def _kept_counts(budget: _Budget) -> tuple[int, int]:
    """Return how many groups and neurons of a layer LLM-Pruner's code keeps (``prune_local`` of its MetaPruner).

    Of n channels it keeps ``int(n (1 - ratio))``, in Python's floats without a guard: 65 of 100 at a ratio of 0.34.
    Key channels are counted in the same way, and a group is removed for every ``head_dim`` of them to remove; with
    query heads as units, the query channels of a group.
    """
    shape, rules = budget.shape, budget.rules
    channels = budget.units * shape.head_dim
    due = channels - int(channels * (1 - rules.ratio))
    return max(budget.units - due // shape.head_dim, rules.kv_groups_multiple), int(shape.ffn * (1 - rules.ratio))


def _removed_units(budget: _Budget, layers: int) -> int:
    """Return how many attention units to remove from ``layers`` layers together."""
    rules, units = budget.rules, budget.units
    if rules.remove_groups is not None:
        return rules.remove_groups * layers
    return min(int(rules.ratio * units * layers + _GUARD), (units - rules.kv_groups_multiple) * layers)


def _neurons(budget: _Budget, units: int, parts: int) -> int:
    """Return how many neurons to remove from each of ``parts`` equal parts, if attention units are also removed."""
    neurons = int(budget.neurons(units) / parts + _GUARD)
    available = budget.shape.ffn * budget.shape.layers // parts
    if not 0 <= neurons < available:
        name = "heads of each KV group" if budget.rules.attention_unit == "heads" else "KV groups"
        raise UserError(
            f"At a ratio of {budget.rules.ratio} and {units / budget.shape.layers:g} {name} removed per layer, "
            f"{'no' if neurons > 0 else 'more than all'} FFN channels would remain; choose other numbers."
        )
    return neurons


def _best_overall(scores: torch.Tensor, count: int, at_least: int) -> list[int]:
    """Return how many of the ``count`` best of all units [L, n] are in each layer, at least ``at_least`` in each."""
    _check_room(count, at_least * len(scores))
    protected = _protect(scores, at_least)
    order = protected.flatten().sort(descending=True, stable=True).indices[:count]
    return torch.bincount(order // scores.shape[1], minlength=len(scores)).tolist()


def _compare_all(attention: torch.Tensor, ffn: torch.Tensor, budget: _Budget) -> tuple[list[int], list[int]]:
    """Rank all units together, and keep the best ones whose total weight is nearest to what the ratio leaves.

    The published script, and so compat, then drops the last of these, whose score is its threshold.
    """
    rules, layers = budget.rules, budget.shape.layers
    floors = (rules.kv_groups_multiple, rules.ffn_multiple)
    protected = [_protect(scores, floor).flatten() for scores, floor in zip((attention, ffn), floors, strict=True)]
    order = torch.cat(protected).sort(descending=True, stable=True).indices
    weights = torch.ones(len(order), dtype=torch.float64)
    weights[: attention.numel()] = budget.unit
    kept_weight = weights[order].cumsum(dim=0)
    wanted = (1 - rules.ratio) * (weights.sum() + budget.fixed) - budget.fixed
    count = int((kept_weight - wanted).abs().argmin()) + (0 if rules.compat else 1)
    _check_room(count, layers * sum(floors))
    kept = order[:count]
    of_attention = kept < attention.numel()
    return (
        torch.bincount(kept[of_attention] // attention.shape[1], minlength=layers).tolist(),
        torch.bincount((kept[~of_attention] - attention.numel()) // ffn.shape[1], minlength=layers).tolist(),
    )


def _protect(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return scores [L, n] with the ``count`` best of each layer set to infinity."""
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return scores.scatter(1, best, torch.inf)


def _check_room(count: int, needed: int) -> None:
    if count < needed:
        raise UserError("The ratio leaves every layer less than the smallest possible size; choose a lower one.")


def _settle(units: list[int], ffn: list[int], budget: _Budget) -> tuple[list[int], list[int]]:
    """Round the counts to multiples, or to equal counts; neurons absorb the rounding error of attention units."""
    rules, shape = budget.rules, budget.shape
    even = rules.uniform or rules.structure.startswith("UL")
    settled = _round(units, sum(units), rules.kv_groups_multiple, budget.units, even)
    neurons = float(sum(ffn))
    if rules.structure != "UL-UM":
        every = shape.layers * budget.units
        neurons += budget.neurons(every - sum(units)) - budget.neurons(every - sum(settled))
    return settled, _round(ffn, neurons, rules.ffn_multiple, shape.ffn, even)


def _round(counts: Sequence[int], total: float, multiple: int, most: int, even: bool) -> list[int]:
    """Return multiples near ``counts``, at least one multiple and at most ``most`` each, with a sum near ``total``.

    Shares are rounded down, and those with the largest remainders up until the total is reached (Hamilton's method).
    """
    layers, largest = len(counts), most // multiple
    if even:
        return [multiple * min(max(1, round(total / layers / multiple)), largest)] * layers
    shares = [count * total / sum(counts) / multiple for count in counts]
    whole = [min(max(1, int(share + _GUARD)), largest) for share in shares]
    missing = round(total / multiple) - sum(whole)
    by_remainder = sorted(range(layers), key=lambda layer: whole[layer] - shares[layer])
    for layer in [layer for layer in by_remainder if whole[layer] < largest][: max(0, missing)]:
        whole[layer] += 1
    return [multiple * count for count in whole]
