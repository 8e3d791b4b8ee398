"""Distillation losses per token: forward KL divergence between logits, and the distance of hidden states.

Logits may be sharded by vocabulary over tensor parallel ranks, as Megatron leaves them: two reductions of a few
numbers per token give maxima and sums over the whole vocabulary, and no rank ever holds all logits of a token. This
module does not import Megatron.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.nn.functional import cosine_similarity


def vocabulary_parallel_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    group: distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return ``T^2 KL(p || q)`` of every token, where ``p = softmax(t / T)`` and ``q = softmax(s / T)``.

    Hinton et al. (1503.02531, section 2) scale by ``T^2`` so that the gradient ``T (q - p)`` with respect to the
    student's logits keeps its size at any temperature. Muralidharan et al. (2407.14679, section 3.2) distil pruned
    models with this loss at T = 1.

    With ``top_k``, p is restricted to the teacher's k most likely tokens and renormalised: ``p_i`` is proportional to
    ``exp(t_i / T)`` where ``t_i`` is at least the k-th largest logit of the whole vocabulary, and 0 elsewhere. All
    tokens that tie with the k-th are kept, so that the result does not depend on the order of tokens or ranks. q
    remains a distribution over the whole vocabulary: the student's probability of other tokens adds to the loss.

    Args:
        student: Logits [..., V / ranks] of this rank's part of the vocabulary; gradients flow to it alone.
        teacher: The teacher's logits for the same tokens and columns.
        temperature: T, above 0.
        top_k: How many of the teacher's tokens count; None for all.
        group: Ranks that share the vocabulary in equal parts; None if it is not sharded.

    Returns:
        Divergence in nats [...], at least fp32, the same on all ranks of the group.

    Raises:
        ValueError: student and teacher logits differ in shape.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Logits {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher do not "
            "have the same tokens and columns."
        )
    divergence: torch.Tensor = _ForwardKL.apply(student, teacher, temperature, top_k, group)
    return divergence


TOKENS_AT_ONCE = 512
"""Number of tokens whose exponentials are held in fp32 at a time: 0.26 GB per tensor for 128,256 columns. The gradient
saved for backward has the dtype of the logits."""


class _ForwardKL(torch.autograd.Function):
    """Computes the gradient ``T (q - p)`` in the forward pass, where the exponentials are available."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        temperature: float,
        top_k: int | None,
        group: distributed.ProcessGroup | None,
    ) -> torch.Tensor:
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        rows = [logits.flatten(0, -2).split(TOKENS_AT_ONCE) for logits in (student, teacher, gradient)]
        parts = []
        for s, t, gradient_of_part in zip(*rows, strict=True):
            kl, part = _kl_and_gradient(s, t, temperature, top_k, group)
            gradient_of_part.copy_(part)
            parts.append(kl)
        ctx.save_for_backward(gradient)
        return torch.cat(parts).view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].unsqueeze(-1).to(gradient.dtype), None, None, None, None


def _kl_and_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    top_k: int | None,
    group: distributed.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``T^2 KL(p || q)`` [tokens] and its gradient ``T (q - p)`` [tokens, V / ranks]."""
    precise = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(precise) / temperature, teacher.to(precise) / temperature
    left_out = None if top_k is None else t < _kth_largest(t, top_k, group)
    maxima = torch.stack([s.amax(-1), t.amax(-1)])
    reduce(maxima, distributed.ReduceOp.MAX, group)
    s -= maxima[0].unsqueeze(-1)
    t -= maxima[1].unsqueeze(-1)
    q, p = s.exp(), t.exp()
    if left_out is not None:
        p.masked_fill_(left_out, 0.0)
    sums = torch.stack([q.sum(-1), p.sum(-1), (p * t.sub_(s)).sum(-1)])
    reduce(sums, distributed.ReduceOp.SUM, group)
    q_sum, p_sum, difference = sums
    gradient = q.div_(q_sum.unsqueeze(-1)).sub_(p.div_(p_sum.unsqueeze(-1))).mul_(temperature)
    return temperature**2 * (difference / p_sum - p_sum.log() + q_sum.log()), gradient


def _kth_largest(logits: torch.Tensor, k: int, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Return the k-th largest logit [..., 1] of the whole vocabulary; the smallest if there are fewer than k."""
    largest = logits.topk(min(k, logits.shape[-1])).values
    if group is not None:
        of_ranks = [torch.empty_like(largest) for _ in range(group.size())]
        distributed.all_gather(of_ranks, largest, group=group)
        largest = torch.cat(of_ranks, -1)
        largest = largest.topk(min(k, largest.shape[-1])).values
    return largest[..., -1:]


def reduce(values: torch.Tensor, operation: Any, group: distributed.ProcessGroup | None) -> None:
    """Reduce values over a group in place; None for a single rank."""
    if group is not None:
        distributed.all_reduce(values, operation, group=group)


_EPS = 1e-6


def hidden_loss(
    student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor | None = None, *, kind: str = "cosine"
) -> torch.Tensor:
    """Return the distance between the residual streams of student and teacher at each token.

    Minitron (2407.14679, section 3.2) compares normalised states, the student's projected to the teacher's width by
    one linear map that all layers share, and finds the cosine best. Both are divided by their root mean square, an
    RMSNorm without weight: the models' own norms are fused into other layers, and amplify channels that carry no
    information.

    Args:
        student: States [..., d].
        teacher: States of the same tokens [..., D].
        projection: Map [d, D]; None if both have the same width.
        kind: ``cosine`` for 1 - cos, in [0, 2]; ``mse`` for the mean squared difference over channels.

    Returns:
        The loss [...], at least fp32.

    Raises:
        ValueError: ``kind`` is neither.
    """
    precise = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (_normalised(states.to(precise)) for states in (student, teacher))
    if projection is not None:
        ours = ours @ projection.to(precise)
    if kind == "cosine":
        return 1 - cosine_similarity(ours, theirs, dim=-1)
    if kind == "mse":
        return (ours - theirs).square().mean(-1)
    raise ValueError(f"There is no hidden loss {kind!r}; choose cosine or mse.")


def initial_projection(student: int, teacher: int, seed: int) -> torch.Tensor:
    """Return a random map [student, teacher] between widths that about preserves the root mean square of its input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(student, teacher, generator=generator) / student**0.5


def _normalised(states: torch.Tensor) -> torch.Tensor:
    return states * (states.square().mean(-1, keepdim=True) + _EPS).rsqrt()
