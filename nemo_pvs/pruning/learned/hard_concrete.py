"""Hard concrete gates: random factors in [0, 1] that are exactly 0 with a learnable probability.

Louizos et al., "Learning Sparse Neural Networks through L0 Regularization" (arXiv 1712.01312), with the constants of
Sheared LLaMA's published code (arXiv 2310.06694).
"""

from __future__ import annotations

import math

import torch

LOW, HIGH = -0.1, 1.1
"""The interval that a concrete variable is stretched to before it is clamped to [0, 1]."""
TEMPERATURE = 2 / 3
SMALLEST = 1e-6
"""Smallest distance of noise and probabilities from 0 and 1."""
LOG_ALPHA_RANGE = (math.log(0.01), math.log(100))
LOG_ALPHA_START = 5.0
"""Clamped to the range before it is used: gates start with a probability of 0.2 % of being 0."""
_EXPORT_SCALE = 0.8


def sample(log_alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample gates z from noise u (``uniform``) in (0, 1), all [..., n]; differentiable except where clamped.

    ``z = clip(1.2 y - 0.1, 0, 1)`` with ``y = sigmoid((logit(u) + log_alpha) / tau)`` and the temperature tau.
    """
    concrete = torch.sigmoid((torch.logit(uniform) + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def zero_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return the probability that ``sample`` returns 0 [..., n]: ``sigmoid(tau ln(0.1 / 1.1) - log_alpha)``."""
    threshold = TEMPERATURE * math.log(-LOW / HIGH)
    return torch.sigmoid(threshold - log_alpha).clamp(SMALLEST, 1 - SMALLEST)


def deterministic(log_alpha: torch.Tensor, kept: int) -> torch.Tensor:
    """Return gates without noise, with all but the ``kept`` largest of each row [..., n] set to 0.

    The others are ``sigmoid(0.8 log_alpha / tau)``, so less than 1: 0.996 at most. Ties go to the lower index.
    """
    gates = torch.sigmoid(log_alpha / TEMPERATURE * _EXPORT_SCALE)
    order = log_alpha.argsort(dim=-1, descending=True, stable=True)
    return gates.scatter(-1, order[..., kept:], 0.0)


def lagrangian(sparsity: torch.Tensor, target: float, multipliers: torch.Tensor) -> torch.Tensor:
    """Return the penalty for missing a target: the mean over rows of ``l1 (s - t) + l2 (s - t)^2``.

    Descent in ``sparsity`` and ascent in ``multipliers`` (l1, l2) meet where s = t (Sheared LLaMA, eq. 3; Wang et al.,
    arXiv 1910.04732).

    Args:
        sparsity: Expected share of zeros (s) in each row [rows], or a scalar.
        target: The share to reach (t).
        multipliers: l1 and l2 [2].
    """
    excess = sparsity - target
    return (multipliers[0] * excess + multipliers[1] * excess**2).mean()
