"""Log-probabilities of next tokens, without all logits in memory at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import distributed

_LOGITS_AT_ONCE = 1 << 26
"""Elements, 256 MB in fp32: 128k vocabularies need their logits in parts."""
_TOKENS_ON_CPU = 128
"""On a CPU, because the logits of more tokens do not stay in its cache."""


def tokens_at_once(vocab: int, device: torch.device) -> int:
    """Return for how many tokens the fp32 logits [n, vocab] are held at once."""
    tokens = max(1, _LOGITS_AT_ONCE // max(1, vocab))
    return min(tokens, _TOKENS_ON_CPU) if device.type == "cpu" else tokens


class TokenScores(NamedTuple):
    """Scores of target tokens, on the CPU."""

    logprobs: torch.Tensor
    """Natural logarithm of each token's probability given all tokens before it, fp32 [N, S]."""
    greedy: torch.Tensor
    """Whether no other token is more probable, bool [N, S]."""


def next_token_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    first_column: int = 0,
    group: distributed.ProcessGroup | None = None,
) -> TokenScores:
    """Return the scores of target tokens from logits whose vocabulary may be sharded.

    Args:
        logits: All logits [N, S, V], or this rank's shard of columns; without padding columns.
        targets: Token ids [N, S].
        first_column: Token id of this rank's first column.
        group: Ranks that hold the other columns; None if there are none.
    """

    def over_ranks(values: torch.Tensor, operation: distributed.ReduceOp.RedOpType) -> torch.Tensor:
        if group is not None:
            distributed.all_reduce(values, operation, group=group)
        return values

    logprobs, greedy = [], []
    columns = logits.shape[-1]
    # All ranks must take the same parts, though the last ones have fewer columns of an uneven vocabulary, or none.
    most = over_ranks(torch.tensor(columns, device=logits.device), distributed.ReduceOp.MAX)
    step = tokens_at_once(int(most), logits.device)
    for chunk, ids in zip(logits.flatten(0, 1).split(step), targets.flatten().split(step), strict=True):
        chunk = chunk.float()
        # A rank may hold only padding.
        highest = chunk.amax(-1) if columns else chunk.new_full((len(chunk),), -torch.inf)
        highest = over_ranks(highest, distributed.ReduceOp.MAX)
        total = over_ranks((chunk - highest[:, None]).exp().sum(-1), distributed.ReduceOp.SUM)
        column = ids - first_column
        local = (column >= 0) & (column < columns)
        target = torch.zeros_like(highest)
        target[local] = chunk[local, column[local]]
        target = over_ranks(target, distributed.ReduceOp.SUM)
        logprobs.append(target - highest - total.log())
        greedy.append(target == highest)
    return TokenScores(
        torch.cat(logprobs).view(targets.shape).cpu(),
        torch.cat(greedy).view(targets.shape).cpu(),
    )
