"""How many weights a sparse model loses, and which: counts are exact, and of equal scores the first is removed.

Only the matrices of the decoder layers are pruned; embedding, output head and all vectors stay dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Entry, Layout

# For rows longer than this, comparing all pairs costs more than finding the threshold.
_COMPARE_ALL_PAIRS = 16


@dataclass(frozen=True)
class Sparsity:
    """The share of weights that every matrix loses, unstructured or in an N:M pattern."""

    ratio: float
    """Share of the weights that are set to zero, between 0 and 1."""
    pattern: tuple[int, int] | None = None
    """N:M as (zeros, group): of every M consecutive weights of an output row N are zero. None is unstructured."""

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """Parse ``0.5`` (unstructured) or ``2:4`` (zeros : group).

        Raises:
            UserError: it is neither, or it removes nothing or everything.
        """
        try:
            zeros, *group = (int(number) for number in text.split(":")) if ":" in text else (float(text),)
        except ValueError:
            raise UserError(
                f"The sparsity {text!r} is neither a ratio such as 0.5 nor a pattern such as 2:4."
            ) from None
        if len(group) > 1:
            raise UserError(f"The sparsity {text!r} has more than two numbers; write zeros:group, such as 2:4.")
        whole = int(group[0]) if group else 1
        if not 0 < zeros < whole:
            share = "a ratio between 0 and 1" if not group else "fewer zeros than weights in a group, and at least one"
            raise UserError(f"The sparsity {text!r} removes nothing or leaves nothing; choose {share}.")
        return cls(zeros / whole, (int(zeros), whole) if group else None)

    def count(self, weights: int) -> int:
        """Return how many of ``weights`` weights to remove; the guard keeps 100 * 0.29 from rounding down to 28."""
        return int(weights * self.ratio + 1e-9)

    def check(self, name: str, size: tuple[int, ...]) -> None:
        """Check that the rows of a matrix [outputs, inputs] consist of whole groups.

        Raises:
            UserError: the pattern's group does not divide the inputs.
        """
        if self.pattern and size[1] % self.pattern[1]:
            raise UserError(
                f"The sparsity {self} needs groups of {self.pattern[1]} inputs, but {name} has {size[1]}; "
                "choose a group that divides them, or a ratio."
            )

    def __str__(self) -> str:
        return "{}:{}".format(*self.pattern) if self.pattern else str(self.ratio)


def prunable(source: WeightSource, sparsity: Sparsity) -> Iterator[Entry]:
    """Yield the matrices of the decoder layers; the parts of an entry read the same input (q, k, v; gate, up).

    Raises:
        UserError: the pattern does not divide one of them.
    """
    shape = shape_of(source)
    for entry in Layout.for_config(source.config).entries(shape):
        if entry.layer is not None and len(entry.parts[0].axes) == 2:
            for part in entry.parts:
                sparsity.check(part.name, part.size(shape))
            yield entry


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a bool mask of the ``count`` lowest scores along the last axis; ties go to the first.

    Args:
        scores: [..., n], finite.
        count: From 0 to n.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.shape[-1] <= _COMPARE_ALL_PAIRS:
        return _ranks(scores) < count
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, tied = scores < threshold, scores == threshold
    missing = count - below.sum(dim=-1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= missing))


def lowest_in_groups(scores: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """Return a bool mask of the N lowest scores of every M consecutive ones along the last axis [..., n]."""
    zeros, group = pattern
    return lowest(scores.unflatten(-1, (-1, group)), zeros).flatten(-2)


def up_to_threshold(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a bool mask of all scores up to and including the one of rank ``count`` (from 0).

    This is the rule of the published scripts: it selects ``count + 1`` scores and all that tie with the last.
    """
    return scores <= scores.flatten().kthvalue(count + 1).values


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Return the rank of each score [..., n] in its row, from 0 in ascending order; equal scores keep their order."""
    columns = scores.unbind(-1)
    ranks = [torch.zeros_like(column, dtype=torch.int8) for column in columns]
    for later in range(len(columns)):
        for earlier in range(later):
            in_order = columns[earlier] <= columns[later]
            ranks[later] += in_order
            ranks[earlier] += ~in_order
    return torch.stack(ranks, dim=-1)
