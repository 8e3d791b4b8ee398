"""Which units EfficientLLM (2502.06663) may remove, how many at a time, and how far that can lead.

Pure arithmetic, so that recipes can be checked before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape


@dataclass(frozen=True)
class RemovalRules:
    """What may be removed, and how much at a time."""

    parameters: int
    """The target: pruning ends when the model has no more than this many."""
    uniform: bool = True
    """Remove the same number of groups or FFN channels from every layer at a time; otherwise only from the layer with
    the least saliency."""
    groups_at_once: int = 1
    """KV groups removed from a layer at a time."""
    ffn_at_once: int = 1
    """FFN channels removed from a layer at a time."""
    hidden_at_once: int = 1
    """Hidden channels removed at a time."""
    least_groups: int = 1
    """KV groups that every layer keeps."""
    least_ffn: int = 1
    """FFN channels that every layer keeps."""
    least_hidden: int = 1
    """Hidden channels that are kept."""
    per_parameter: bool = True
    """Compare candidates by saliency per parameter; otherwise by total saliency."""


def unit_parameters(shape: Shape, parent: Shape) -> dict[str, int]:
    """Return the parameters of one unit of each kind in a model of this shape, pruned from ``parent``."""
    layer = parent.replace(layers=1, hidden=shape.hidden)
    costs = {"hidden": 0, "groups": 0, "ffn": 0}
    if shape.hidden > 1:
        costs["hidden"] = shape.parameters - shape.replace(hidden=shape.hidden - 1).parameters
    if parent.kv_groups > 1:
        costs["groups"] = layer.parameters - layer.replace(kv_groups=parent.kv_groups - 1).parameters
    if parent.ffn > 1:
        costs["ffn"] = layer.parameters - layer.replace(ffn=parent.ffn - 1).parameters
    return costs


def smallest(shape: Shape, rules: RemovalRules) -> Shape:
    """Return the shape at which nothing more may be removed."""
    sizes = {"hidden": shape.hidden, "groups": shape.kv_groups, "ffn": shape.ffn}
    for kind, at_once, least in unit_kinds(rules):
        sizes[kind] -= at_once * max(0, (sizes[kind] - least) // at_once)
    return shape.replace(hidden=sizes["hidden"], kv_groups=sizes["groups"], ffn=sizes["ffn"])


def fewest_removals(shape: Shape, rules: RemovalRules) -> int:
    """Return a lower bound on the number of removals that reach the target.

    The bound takes the largest removals first, at their size in the dense model: later, the rows and columns that they
    cross have fewer weights.

    Raises:
        UserError: the target is not smaller than the model, or no removals reach it.
    """
    end = smallest(shape, rules)
    if not end.parameters <= rules.parameters < shape.parameters:
        raise UserError(
            f"A model of {shape.parameters:,} parameters cannot be pruned to {rules.parameters:,} by these rules; "
            f"ask for fewer than it has and no fewer than {end.parameters:,}, at which a layer would be pruned to "
            "nothing next."
        )
    layers = shape.layers if rules.uniform else 1
    costs = unit_parameters(shape, shape)
    sizes = {"hidden": (shape.hidden, end.hidden), "groups": (shape.kv_groups, end.kv_groups)}
    sizes["ffn"] = (shape.ffn, end.ffn)
    pools = []
    for kind, at_once, _ in unit_kinds(rules):
        repeats = 1 if kind == "hidden" else layers
        count = (sizes[kind][0] - sizes[kind][1]) // at_once * (1 if kind == "hidden" else shape.layers // layers)
        pools.append((repeats * at_once * costs[kind], count))
    missing, removals = shape.parameters - rules.parameters, 0
    for parameters, count in sorted(pools, reverse=True):
        taken = min(count, -(-max(0, missing) // parameters)) if parameters else 0
        missing -= taken * parameters
        removals += taken
    return removals


def unit_kinds(rules: RemovalRules) -> tuple[tuple[str, int, int], ...]:
    """Return the name, the number at a time and the least number of each kind of unit."""
    return (
        ("hidden", rules.hidden_at_once, rules.least_hidden),
        ("groups", rules.groups_at_once, rules.least_groups),
        ("ffn", rules.ffn_at_once, rules.least_ffn),
    )
