"""Which architectures a search considers: a grid of sizes, a budget, and what the hardware can run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape

_BYTES = 2  # bf16


@dataclass(frozen=True)
class Grid:
    """The sizes to combine, each in ascending order."""

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[int, ...]
    kv_groups: tuple[int, ...]
    heads: tuple[int, ...] = ()
    """Query heads, for KV groups that can share them equally; if empty, all heads of the kept groups."""

    @classmethod
    def of(
        cls,
        parent: Shape,
        *,
        layers_step: int = 2,
        hidden_step: int | None = None,
        ffn_step: int | None = None,
        kv_groups_step: int = 0,
        heads_step: int = 0,
        max_width_pruning: float = 0.4,
        max_depth_pruning: float = 0.2,
    ) -> Grid:
        """Combine the parent's own sizes with multiples of steps below them.

        The defaults are those of ModelOpt's search (``mcore_minitron``): layers by 2 and, for Llama-3.1-8B, hidden by
        256 and ffn by 512, at most 40 % less width and 20 % fewer layers. For other models the steps are about the
        same parts (1/16, 1/28) of their sizes.

        Args:
            parent: The model that is to be pruned.
            layers_step: Step in layers; 0 keeps all.
            hidden_step: Step in hidden channels; 0 keeps all.
            ffn_step: Step in FFN channels; 0 keeps all.
            kv_groups_step: Step in KV groups, which take their query heads along; 0 keeps all.
            heads_step: Step in query heads, the same number in every kept KV group; 0 keeps all of these.
            max_width_pruning: Largest share of hidden, ffn, kv_groups and heads to remove.
            max_depth_pruning: Largest share of layers to remove.

        Raises:
            UserError: a number makes no sense.
        """
        steps = (layers_step, hidden_step or 0, ffn_step or 0, kv_groups_step, heads_step)
        if min(steps) < 0 or not (0 <= max_width_pruning < 1 and 0 <= max_depth_pruning < 1):
            raise UserError("A search needs steps of 0 or more, and largest shares to remove from 0 to below 1.")
        hidden_step = _step(parent, parent.hidden / 16) if hidden_step is None else hidden_step
        ffn_step = _step(parent, parent.ffn / 28) if ffn_step is None else ffn_step
        grid = cls(
            _choices(parent.layers, layers_step, max_depth_pruning),
            _choices(parent.hidden, hidden_step, max_width_pruning),
            _choices(parent.ffn, ffn_step, max_width_pruning),
            _choices(parent.kv_groups, kv_groups_step, max_width_pruning),
            _choices(parent.heads, heads_step, max_width_pruning) if heads_step else (),
        )
        if heads_step and all(len(grid.heads_in(groups, parent)) == 1 for groups in grid.kv_groups):
            raise UserError(
                f"A step of {heads_step} in query heads gives no number that the KV groups could share equally and "
                f"that removes at most {max_width_pruning:.0%}; choose a divisor of {parent.kv_groups}, or allow more "
                "pruning."
            )
        return grid

    def heads_in(self, kv_groups: int, parent: Shape) -> tuple[int, ...]:
        """Return the numbers of query heads that ``kv_groups`` groups can keep, in ascending order."""
        every = kv_groups * parent.heads_per_group
        return (*(heads for heads in self.heads if heads < every and heads % kv_groups == 0), every)


@dataclass(frozen=True)
class SizeLimit:
    """What a model may cost; a model is considered if it is within ``tolerance`` of the sizes that are given."""

    parameters: float | None = None
    memory_bytes: float | None = None
    """For weights and KV cache, see ``inference_bytes``."""
    tolerance: float = 0.05
    """Relative, to both sides; 5 % as in Minitron (2407.14679)."""
    context: int = 4096
    """Tokens per sequence, for the KV cache and for FLOPs."""
    batch_size: int = 1
    """Sequences that are decoded at once."""
    flops_per_token: float | None = None
    """Upper bound of the forward FLOPs per token, in a sequence of ``context`` tokens."""

    def __post_init__(self) -> None:
        given = (self.parameters, self.memory_bytes, self.flops_per_token, self.context, self.batch_size)
        if not 0 <= self.tolerance < 1 or any(value is not None and value <= 0 for value in given):
            raise UserError("A search's budget needs numbers above 0 and a tolerance from 0 to below 1.")

    def admits(self, shape: Shape) -> bool:
        """Whether a model of this shape is within the tolerance of parameters and memory."""
        spent = (
            (self.parameters, shape.parameters),
            (self.memory_bytes, inference_bytes(shape, self.context, self.batch_size)),
        )
        return all(wanted is None or abs(size - wanted) <= self.tolerance * wanted for wanted, size in spent)


def legal_shapes(
    parent: Shape,
    grid: Grid,
    budget: SizeLimit,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    fp8: bool = False,
) -> list[Shape]:
    """Return the smaller models of the grid that are within the budget and run on a parallel layout.

    Args:
        parent: The model that is to be pruned, its layers alike.
        grid: Sizes to combine.
        budget: What a model may cost.
        tensor_parallel: As for ``Shape.check_parallel``.
        pipeline_parallel: As for ``Shape.check_parallel``.
        fp8: As for ``Shape.check_parallel``.

    Raises:
        UserError: there is none.
    """
    if parent.uneven:
        raise UserError("A search needs a parent whose layers are alike; this one's are uneven.")
    affordable = [shape for shape in _shapes(parent, grid) if budget.admits(shape)]
    if not affordable:
        raise UserError(f"No shape of the grid is within the budget; {_reach(parent, grid, budget)}")
    legal = [shape for shape in affordable if _runs(shape, tensor_parallel, pipeline_parallel, fp8)]
    if not legal:
        raise UserError(
            f"None of the {len(affordable)} shapes within the budget can be split by tensor parallelism "
            f"{tensor_parallel} and pipeline parallelism {pipeline_parallel}{' in FP8' if fp8 else ''}; "
            "use fewer ranks or other steps."
        )
    bound = budget.flops_per_token
    if bound is None:
        return legal
    flops = flops_at(budget.context)
    cheap = [shape for shape in legal if flops(shape) <= bound]
    if not cheap:
        raise UserError(
            f"None of the {len(legal)} legal shapes within the budget takes at most {bound:g} FLOPs per token; "
            f"the least is {min(map(flops, legal)):g}."
        )
    return cheap


def inference_bytes(shape: Shape, context: int, batch_size: int = 1) -> int:
    """Return the bytes for weights and KV cache in bf16: ``2 P + 2 * 2 * batch * context * h * sum over layers of G``.

    ModelOpt's ``memory_mb`` counts the same, with a context of 4096 and one sequence.
    """
    groups = sum(layer.kv_groups for layer in shape.layer_sizes)
    return _BYTES * (shape.parameters + 2 * batch_size * context * shape.head_dim * groups)


def flops_at(context: int) -> Callable[[Shape], float]:
    """Return a function from a shape to its forward FLOPs per token, in a sequence of ``context`` tokens."""
    return lambda shape: float(shape.flops_per_token(sequence_length=context, training=False))


def _shapes(parent: Shape, grid: Grid) -> Iterator[Shape]:
    for layers, hidden, ffn, kv_groups in product(grid.layers, grid.hidden, grid.ffn, grid.kv_groups):
        for heads in grid.heads_in(kv_groups, parent):
            shape = parent.replace(layers=layers, hidden=hidden, ffn=ffn, kv_groups=kv_groups, heads=heads)
            if shape != parent:
                yield shape


def _runs(shape: Shape, tensor_parallel: int, pipeline_parallel: int, fp8: bool) -> bool:
    try:
        shape.check_parallel(tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, fp8=fp8)
    except UserError:
        return False
    return True


def _reach(parent: Shape, grid: Grid, budget: SizeLimit) -> str:
    """Say what sizes the grid has, in the unit of the budget."""
    advice = "allow more pruning (max_width_pruning, max_depth_pruning) or smaller steps."
    shapes = list(_shapes(parent, grid))
    if not shapes:
        return f"it holds the parent alone; {advice}"
    if budget.parameters is not None:
        unit, sizes = "parameters", [float(shape.parameters) for shape in shapes]
    else:
        unit = "bytes"
        sizes = [float(inference_bytes(shape, budget.context, budget.batch_size)) for shape in shapes]
    return f"it reaches from {min(sizes):.4g} to {max(sizes):.4g} {unit}; {advice}"


def _step(parent: Shape, about: float) -> int:
    multiple = math.gcd(parent.hidden, parent.ffn, 128)
    return multiple * max(1, round(about / multiple))


def _choices(size: int, step: int, max_pruning: float) -> tuple[int, ...]:
    smallest = (1 - max_pruning) * size
    multiples = range(step, size, step) if step else ()
    return (*(choice for choice in multiples if choice >= smallest), size)
