"""What pruning removed: how much, and at which granularity."""

from __future__ import annotations

from typing import Literal, get_args

from nemo_pvs.model.shape import Shape
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.results import ArmResult, Results, at

Granularity = Literal["depth", "width", "depth and width", "N:M", "unstructured"]
"""Layers; channels, heads and KV groups; both; weights in a pattern such as 2:4; single weights anywhere."""
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
"""From coarse to fine."""
FINE: tuple[Granularity, ...] = ("N:M", "unstructured")


def removed_share(results: Results, arm: ArmResult) -> float | None:
    """Return the share of the parent's parameters that an arm lacks, counting masked weights as removed.

    None if there is no parent.
    """
    if results.parent is None:
        return None
    return 1 - (arm.shape.parameters - arm.masked_parameters) / results.parent.shape.parameters


def granularity(runs: SideBySide, arm: ArmResult) -> Granularity | None:
    """Return what was removed, from the shapes of arm and parent; None if nothing was, or there is no parent."""
    if pattern(runs, arm):
        return "N:M"
    if arm.masked_parameters:
        return "unstructured"
    parent = runs.results.parent
    if parent is None or arm.shape.parameters == parent.shape.parameters:
        return None
    return dimensions_removed(arm.shape, parent.shape)


def dimensions_removed(shape: Shape, parent: Shape) -> Literal["depth", "width", "depth and width"]:
    """Return whether a smaller shape has fewer layers than its parent, narrower ones, or both."""
    if shape.layers == parent.layers:
        return "width"
    if not shape.uneven and shape.replace(layers=parent.layers) == parent:
        return "depth"
    return "depth and width"


def pattern(runs: SideBySide, arm: ArmResult) -> str | None:
    """Return the N:M pattern of an arm's masks as its recipe gives it (``2:4``); None for other arms."""
    if not arm.masked_parameters:
        return None
    run, original = runs.repetitions[arm.name][0]
    sparsity = at(run.results.recipe, "targets", original.target, "sparsity")
    return sparsity if isinstance(sparsity, str) and ":" in sparsity else None


def method_of(runs: SideBySide, arm: ArmResult) -> str:
    """Return an arm's method with its pattern: ``wanda 2:4``, as the paper's tables tell them apart."""
    return " ".join(filter(None, [arm.method, pattern(runs, arm)]))
