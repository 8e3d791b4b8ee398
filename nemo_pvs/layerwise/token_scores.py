"""Log-probabilities of the next token, without all logits in memory at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import distributed

# Logits turned into fp32 at once, in elements (256 MB).
_LOGITS_AT_ONCE = 1 << 26


class TokenScores(NamedTuple):
    """What a model says about each token but the first of its sequence, on the CPU."""

    logprobs: torch.Tensor
    """fp32 [N, S - 1]: natural logarithm of the token's probability, given all before it."""
    greedy: torch.Tensor
    """bool [N, S - 1]: no other token is more probable."""


def next_token_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    first_column: int = 0,
    group: distributed.ProcessGroup | None = None,
) -> TokenScores:
    """Return the scores of target tokens from logits whose vocabulary may be sharded.

    Args:
        logits: [N, S, V] on one rank, or this rank's columns of them; no padding columns.
        targets: Token ids [N, S].
        first_column: The token that this rank's first column stands for.
        group: Ranks that hold the other columns; None if there are none.
    """

    def over_ranks(values: torch.Tensor, operation: distributed.ReduceOp.RedOpType) -> torch.Tensor:
        if group is not None:
            distributed.all_reduce(values, operation, group=group)
        return values

    logprobs, greedy = [], []
    columns = logits.shape[-1]
    step = max(1, _LOGITS_AT_ONCE // max(1, columns))
    for some, wanted in zip(logits.flatten(0, 1).split(step), targets.flatten().split(step), strict=True):
        some = some.float()
        # A rank may hold nothing but padding.
        highest = some.amax(-1) if columns else some.new_full((len(some),), -torch.inf)
        highest = over_ranks(highest, distributed.ReduceOp.MAX)
        total = over_ranks((some - highest[:, None]).exp().sum(-1), distributed.ReduceOp.SUM)
        column = wanted - first_column
        here = (column >= 0) & (column < columns)
        own = torch.zeros_like(highest)
        own[here] = some[here, column[here]]
        own = over_ranks(own, distributed.ReduceOp.SUM)
        logprobs.append(own - highest - total.log())
        greedy.append(own == highest)
    return TokenScores(
        torch.cat(logprobs).view(targets.shape).cpu(),
        torch.cat(greedy).view(targets.shape).cpu(),
    )
