"""Steps that several methods share, from a request to a pruned model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import Expected
from nemo_pvs.pruning.options import VOCAB, SizesOrPreset, SizesOrRatio, Sparse, Units

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan
    from nemo_pvs.pruning.request import PruneRequest
    from nemo_pvs.pruning.result import Pruned


def to_shape(method: str, plan: Callable[[PruneRequest[Any], Shape], Plan]) -> Callable[[PruneRequest[Any]], Pruned]:
    """Return the ``prune`` function of a method that prunes to a given shape."""

    def prune(request: PruneRequest[Any]) -> Pruned:
        from nemo_pvs.checkpoints.source import shape_of

        parent = shape_of(request.source)
        target = _target(method, request.options, parent)
        if parent.uneven:  # which layers are kept determines their sizes
            return planned(request, plan(request, target))
        _announce(request, parent, target)
        return _pruned(request, plan(request, target))

    return prune


def by_scores(
    plan: Callable[..., Plan], expected: Callable[[Any, Shape], Expected]
) -> Callable[[PruneRequest[Any]], Pruned]:
    """Return the ``prune`` function of a method that removes a given ratio by the scores of a calibration.

    Args:
        plan: Takes the scores, the ratio and the other options that were given, and returns the plan.
        expected: The method's ``expected``.
    """

    def prune(request: PruneRequest[Any]) -> Pruned:
        from nemo_pvs.checkpoints.source import shape_of
        from nemo_pvs.pruning.target import with_vocabulary

        if request.options.ratio is None:
            raise UserError("Nothing says how much to prune; give --ratio 0.2 for a fifth of the decoder layers.")
        parent = shape_of(request.source)
        if request.options.structure.startswith("UL") and not parent.uneven:
            # No scores can change the sizes, so what is wrong with them is said before any are measured.
            request.check(with_vocabulary(expected(request.options, parent).shape, request.options))
        others = request.options.given()
        others.pop(VOCAB, None)  # ``_pruned`` removes tokens, whatever the method
        return planned(request, plan(request.scores(), others.pop("ratio"), **others))

    return prune


def planned(request: PruneRequest[Any], plan: Plan) -> Pruned:
    """Check the shape that a plan leaves and return the pruned model."""
    from nemo_pvs.checkpoints.source import shape_of

    _announce(request, shape_of(request.source), plan.target)
    return _pruned(request, plan)


def _announce(request: PruneRequest[Any], parent: Shape, target: Shape) -> None:
    from nemo_pvs.pruning.target import describe_removal, with_vocabulary

    target = with_vocabulary(target, request.options)
    request.check(target)
    request.say(f"target: {target}; {describe_removal(parent, target)}")


def _pruned(request: PruneRequest[Any], plan: Plan) -> Pruned:
    from nemo_pvs.pruning.apply import PrunedSource
    from nemo_pvs.pruning.result import Pruned
    from nemo_pvs.pruning.vocabulary.choice import with_fewer_tokens

    size = getattr(request.options, VOCAB, None)
    if size is not None:
        plan = with_fewer_tokens(plan, request, size)
    return Pruned(PrunedSource(request.source, plan), plan, {"method": plan.method})


def expected_sizes(method: str) -> Callable[[SizesOrPreset, Shape], Expected]:
    """Return the ``expected`` function of a method whose target is given by sizes, a ratio or a preset."""

    def expected(options: SizesOrPreset, parent: Shape) -> Expected:
        from nemo_pvs.pruning.target import average_of_layers

        target = _target(method, options, parent)
        if parent.uneven:
            return Expected(average_of_layers(parent, target.layers), exact=False, uneven=True)
        return Expected(target, exact=True)

    return expected


def _target(method: str, options: SizesOrPreset, parent: Shape) -> Shape:
    """Return the target; for a parent with uneven layers only its number of layers counts."""
    from nemo_pvs.pruning.target import choose_target

    amount: dict[str, Any] = {"sizes": options.sizes, "preset": options.preset}
    if isinstance(options, SizesOrRatio):
        amount |= {"ratio": options.ratio, "of": options.of}
    target = choose_target(parent, method, **amount)
    if getattr(options, "merge_heads", False) and target.heads_per_group == parent.heads_per_group:
        raise UserError(
            f"merge_heads adds removed query heads to kept ones, but the target keeps all {parent.heads_per_group} "
            "query heads of each KV group; give heads in the target, or leave merge_heads out."
        )
    return target


def expected_units(options: Units, parent: Shape, **rules: Any) -> Expected:
    """Return the shape after units are removed by a ratio; approximate if layers compete for units."""
    import torch

    from nemo_pvs.pruning.structured.unit_counts import UnitRules, unit_counts

    if options.ratio is None:
        raise UserError("Nothing says how much to prune; give a ratio, such as 0.2 for a fifth of the decoder layers.")
    exact = options.structure.startswith("UL")
    names = (
        "remove_groups",
        "uniform",
        "ffn_multiple",
        "kv_groups_multiple",
        "compat",
        "protect_first",
        "protect_last",
        "attention_unit",
    )
    given = options.given(*(name for name in names if name in type(options).model_fields))
    structure = options.structure if exact else "UL-MM"
    # If all pruned layers get the same size, the counts do not depend on the scores.
    unit_rules = UnitRules(structure=structure, ratio=options.ratio, **rules, **given)
    counts = unit_counts(
        torch.zeros(parent.layers, unit_rules.units(parent)),
        torch.zeros(parent.layers, parent.ffn),
        parent,
        unit_rules,
    )
    layers = (unit_rules.sizes(parent, *kept) for kept in zip(*counts, strict=True))
    uneven = not exact and not getattr(options, "uniform", False)
    return Expected(parent.with_layers(layers), exact, uneven)


def expected_masked(options: Sparse, parent: Shape) -> Expected:
    """Return the parent's shape, which sparsity does not change, after checking that the pattern divides its matrices.

    Raises:
        UserError: the pattern does not divide a matrix, or the sparsity is malformed.
    """
    from nemo_pvs.pruning.sparse.sparsity import Sparsity

    if options.sparsity is not None:
        sparsity = Sparsity.parse(options.sparsity)
        for name, inputs in (("q_proj", parent.hidden), ("o_proj", parent.axis("query")), ("down_proj", parent.ffn)):
            sparsity.check(name, (1, inputs))
    return Expected(parent, exact=True)


def sparsity_of(request: PruneRequest[Any]) -> Any:
    """Return the requested ``Sparsity``.

    Raises:
        UserError: no sparsity is given, or it is malformed.
    """
    from nemo_pvs.pruning.sparse.sparsity import Sparsity

    if request.options.sparsity is None:
        raise UserError("Nothing says how sparse; give --sparsity 0.5 or --sparsity 2:4.")
    return Sparsity.parse(request.options.sparsity)


def layer_by_layer(request: PruneRequest[Any], method: Any) -> Pruned:
    """Prune every matrix by its inputs, layer by layer."""
    from nemo_pvs.pruning.result import Pruned
    from nemo_pvs.pruning.sparse.sequential import prune_layers

    with request.progress(f"prune by {method.settings['method']}", "sequences through a layer") as show:
        source = prune_layers(
            request.source,
            request.tokens(),
            method,
            request.work_folder,
            calibration="sequential" if request.options.sequential else "dense",
            overwrite=request.overwrite,
            compute=request.compute,
            progress=show,
            warn=request.say,
        )
    return Pruned(source, None, source.record["settings"])


def in_training(method: str) -> Callable[[PruneRequest[Any]], Pruned]:
    """Return the ``prune`` function of a method that prunes during training, in a stage of ``pvs run``: an error."""

    def prune(request: PruneRequest[Any]) -> Pruned:
        raise UserError(
            f"{method} trains the model while it finds out what to keep; write a recipe with a target of this method, "
            "and use pvs run."
        )

    return prune
