"""Wanda: prune by weight times the norm of its input (Sun et al., 2306.11695)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_pvs.calibration.statistics import Energy
from nemo_pvs.pruning.sparse.sparsity import Sparsity, lowest, lowest_in_groups


def wanda_mask(weight: torch.Tensor, square_sums: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Return the mask of kept weights, bool [outputs, inputs]: all but those with the lowest scores in each row.

    The score of a weight is ``|W_ij| sqrt(s_j)`` (2306.11695, equation 1), in fp32. Exactly ``int(inputs * ratio)``
    are removed from every row, or N of every M consecutive ones; of equal scores the first.

    Args:
        weight: W [outputs, inputs].
        square_sums: Sum of the squares of each input over all tokens (s) [inputs], up to a common factor.
        sparsity: How many to remove.
    """
    scores = weight.float().abs() * square_sums.float().sqrt().to(weight.device)
    if sparsity.pattern:
        return ~lowest_in_groups(scores, sparsity.pattern)
    return ~lowest(scores, sparsity.count(weight.shape[1]))


@dataclass(frozen=True)
class Wanda:
    """The method for ``sequential.prune_layers``; kept weights are not changed."""

    sparsity: Sparsity

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the result depends on."""
        return {"method": "wanda", "sparsity": str(self.sparsity)}

    def statistic(self, channels: int) -> Energy:
        """Return an empty statistic of an input with ``channels`` channels."""
        return Energy(channels)

    def pruner(
        self, total: torch.Tensor, sequences: int, warn: Callable[[str], None]
    ) -> Callable[[Sequence[torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return a function from all matrices that read one input to (pruned matrix, mask) of each.

        Args:
            total: Sum of the squares over all tokens [inputs].
            sequences: Number of calibration sequences; the published score uses the mean over them.
            warn: Not used.
        """
        square_sums = total / sequences

        def prune(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kept = wanda_mask(weight, square_sums, self.sparsity)
            return weight.masked_fill(~kept, 0), kept

        return lambda weights: [prune(weight) for weight in weights]
