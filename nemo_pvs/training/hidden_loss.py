"""The loss of distillation between hidden states of a teacher and a student, token by token. No Megatron."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

_EPS = 1e-6


def hidden_loss(
    student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor | None = None, *, kind: str = "cosine"
) -> torch.Tensor:
    """Return how far the student's residual stream is from the teacher's at each token.

    Minitron (2407.14679, section 3.2) compares normalised states, the student's brought to the teacher's width by one
    linear map that all places share, and finds the cosine best. Both are divided by their root mean square, an RMSNorm
    without weight: those of the models are fused into other layers, and stretch channels that carry nothing.

    Args:
        student: States [..., d].
        teacher: States of the same tokens [..., D].
        projection: [d, D]; None where both have the same width.
        kind: ``cosine`` for 1 - cos, which is in [0, 2]; ``mse`` for the squared difference, a mean over channels.

    Returns:
        The loss [...], at least fp32.

    Raises:
        ValueError: there is no such kind.
    """
    precise = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (_normalised(states.to(precise)) for states in (student, teacher))
    if projection is not None:
        ours = ours @ projection.to(precise)
    if kind == "cosine":
        return 1 - cosine_similarity(ours, theirs, dim=-1)
    if kind == "mse":
        return (ours - theirs).square().mean(-1)
    raise ValueError(f"There is no hidden loss {kind!r}; cosine and mse are.")


def initial_projection(student: int, teacher: int, seed: int) -> torch.Tensor:
    """Return the map [student, teacher] of a run that begins: random, and of about the size that it is given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(student, teacher, generator=generator) / student**0.5


def _normalised(states: torch.Tensor) -> torch.Tensor:
    return states * (states.square().mean(-1, keepdim=True) + _EPS).rsqrt()
