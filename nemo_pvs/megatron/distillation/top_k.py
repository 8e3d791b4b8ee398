"""A teacher's k largest log-probabilities per token, and the divergence of a student from them.

Logits may be sharded by vocabulary over tensor parallel ranks, as in ``losses``. This module does not import Megatron.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from nemo_pvs.megatron.distillation.losses import TOKENS_AT_ONCE, reduce

_SMALLEST = 1e-30
"""Sums of exponentials below this count as this, so that no quotient of them is infinite."""


@torch.no_grad()
def top_k_answers(
    logits: torch.Tensor, k: int, *, vocab: int, group: distributed.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a teacher's k most likely tokens, their log-probabilities, and the logarithm of the others' probability.

    If logits are equal at the k-th place, any of these tokens is kept, but exactly k in all.

    Args:
        logits: The teacher's logits [..., V / ranks] of this rank's part of the vocabulary.
        k: Number of tokens, at most ``vocab``.
        vocab: Size of the vocabulary; columns beyond it are padding.
        group: Ranks that share the vocabulary in equal parts; None if it is not sharded.

    Returns:
        Ids [..., k], the most likely token first, log-probabilities [..., k] and the rest [...] in nats, -inf if k is
        the whole vocabulary; at least fp32, the same on all ranks of the group.
    """
    first = _first_column(logits, group)
    parts = [_top_k(part, k, vocab, first, group) for part in logits.flatten(0, -2).split(TOKENS_AT_ONCE)]
    ids, logprobs, rest = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return ids.view(*logits.shape[:-1], k), logprobs.view(*logits.shape[:-1], k), rest.view(logits.shape[:-1])


def _top_k(
    logits: torch.Tensor, k: int, vocab: int, first: int, group: distributed.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    t[:, max(0, vocab - first) :] = -torch.inf
    maxima = t.amax(-1)
    reduce(maxima, distributed.ReduceOp.MAX, group)
    t -= maxima.unsqueeze(-1)
    values, ids = t.topk(min(k, t.shape[-1]))
    ids += first
    if group is not None:
        values, order = _gather(values, group).topk(k)
        ids = _gather(ids, group).gather(-1, order)
    columns, here = _local(ids, first, t.shape[-1])
    p = t.exp_()
    kept = p.gather(-1, columns).masked_fill_(~here, 0.0)
    rest = p.scatter_add_(-1, columns, -kept).sum(-1)  # without subtracting sums, as the rest may be tiny
    reduce(rest, distributed.ReduceOp.SUM, group)
    total = (values.exp().sum(-1) + rest).log()
    return ids, values - total.unsqueeze(-1), rest.log() - total


def top_k_kl(
    student: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    rest: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    group: distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return ``T^2 KL(p || q)`` of every token, where p is known for the teacher's k most likely tokens alone.

    Without ``rest``, p is renormalised over the k tokens, ``p = softmax(logprobs / T)``, as in
    ``losses.vocabulary_parallel_kl`` with ``top_k``. With ``rest``, all other tokens together are one more class, both
    in p and in ``q = softmax(s)``; p is divided by its sum, which rounding may have moved from 1. The rest is known at
    T = 1 only.

    Args:
        student: Logits s [..., V / ranks] of this rank's part of the vocabulary; gradients flow to it alone.
        ids: The teacher's k tokens [..., k], the same on all ranks.
        logprobs: Their log-probabilities at T = 1 [..., k]; a constant added to all of them changes nothing without
            ``rest``.
        rest: Logarithm of the others' probability [...]; None to renormalise.
        temperature: T, above 0.
        group: Ranks that share the vocabulary in equal parts; None if it is not sharded.

    Returns:
        Divergence in nats [...], at least fp32, the same on all ranks of the group.

    Raises:
        ValueError: the teacher's answers are not for the same tokens, or there is a rest at another temperature.
    """
    if ids.shape != logprobs.shape or ids.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"Logits {tuple(student.shape)} of the student and answers {tuple(ids.shape)} of the teacher are not for "
            "the same tokens."
        )
    if rest is not None and temperature != 1.0:
        raise ValueError(f"The rest is known at temperature 1, not {temperature:g}; renormalise.")
    divergence: torch.Tensor = _TopKKL.apply(student, ids, logprobs, rest, temperature, group)
    return divergence


class _TopKKL(torch.autograd.Function):
    """Computes the gradient with respect to the logits in the forward pass, where the exponentials are available."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        ids: torch.Tensor,
        logprobs: torch.Tensor,
        rest: torch.Tensor | None,
        temperature: float,
        group: distributed.ProcessGroup | None,
    ) -> torch.Tensor:
        precise = torch.promote_types(student.dtype, torch.float32)
        z = logprobs.to(precise) / temperature
        if rest is not None:
            z = torch.cat([z, rest.to(precise).unsqueeze(-1)], -1)
        log_p = z.flatten(0, -2).log_softmax(-1)
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        first = _first_column(student, group)
        rows = [part.split(TOKENS_AT_ONCE) for part in (student.flatten(0, -2), log_p, ids.flatten(0, -2))]
        parts = []
        for s, log_p_of_part, ids_of_part, gradient_of_part in zip(
            *rows, gradient.flatten(0, -2).split(TOKENS_AT_ONCE), strict=True
        ):
            # In the memory of the result where it is as precise: fresh memory takes longer than the arithmetic.
            scaled = gradient_of_part if gradient.dtype == precise else torch.empty_like(s, dtype=precise)
            torch.div(s.to(precise), temperature, out=scaled)
            kl = _kl_into_gradient(scaled, log_p_of_part, ids_of_part.long(), rest is not None, first, group)
            if temperature != 1:
                scaled.mul_(temperature)
            if scaled is not gradient_of_part:
                gradient_of_part.copy_(scaled)
            parts.append(temperature**2 * kl)
        ctx.save_for_backward(gradient)
        return torch.cat(parts).view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0].unsqueeze(-1)), None, None, None, None, None


def _kl_into_gradient(
    s: torch.Tensor,
    log_p: torch.Tensor,
    ids: torch.Tensor,
    rest_is_class: bool,
    first: int,
    group: distributed.ProcessGroup | None,
) -> torch.Tensor:
    """Return ``KL(p || softmax(s))`` [tokens], and replace the logits s [tokens, V / ranks] by its gradient.

    With a rest, the last column of ``log_p`` is its class, and no id belongs to it. The gradient is ``q_i - p_i`` for
    the k tokens; the others share that of their class, ``(Q - r) q_j / Q`` where Q and r are its probabilities.
    """
    maxima = s.amax(-1)
    reduce(maxima, distributed.ReduceOp.MAX, group)
    s -= maxima.unsqueeze(-1)
    columns, here = _local(ids, first, s.shape[-1])
    p = log_p.exp()
    p_here = p[:, : ids.shape[-1]] * here
    cross = (p_here * s.gather(-1, columns)).sum(-1)
    q = s.exp_()
    kept = q.gather(-1, columns).mul_(here)
    if rest_is_class:
        q.scatter_add_(-1, columns, -kept)
    sums = torch.stack([q.sum(-1), kept.sum(-1), cross])
    reduce(sums, distributed.ReduceOp.SUM, group)
    total, kept_sum, cross = sums
    if rest_is_class:
        others = total.clamp(min=_SMALLEST)
        total = total + kept_sum
        r = p[:, -1]
        cross = cross + r * others.log()
        share = (1 - r * total / others) / total
        q.mul_(share.unsqueeze(-1)).scatter_add_(-1, columns, kept / total.unsqueeze(-1) - p_here)
    else:
        q.div_(total.unsqueeze(-1)).scatter_add_(-1, columns, -p_here)
    return torch.special.xlogy(p, p).sum(-1) - cross + total.log()


def _first_column(logits: torch.Tensor, group: distributed.ProcessGroup | None) -> int:
    """Return the token of this rank's first column."""
    return 0 if group is None else distributed.get_rank(group) * logits.shape[-1]


def _local(ids: torch.Tensor, first: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's column of each token, any column for tokens of other ranks, and which tokens are its own."""
    local = ids - first
    here = (local >= 0) & (local < columns)
    return local.clamp_(0, columns - 1), here


def _gather(part: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """Return the parts [..., k] of all ranks side by side."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, -1)
