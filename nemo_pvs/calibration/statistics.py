"""Statistics of activations that can be updated batch by batch and merged across processes.

Within a batch sums run in fp32, across batches in fp64; so the result depends on the batching only by fp32 rounding.
In bf16 a sum of equal terms would stop growing after 256 of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class ChannelStatistic(ABC):
    """A statistic with one number a channel, kept as a float64 sum [channels]."""

    def __init__(self, channels: int) -> None:
        self._sum = torch.zeros(channels, dtype=torch.float64)

    def update(self, activations: torch.Tensor) -> None:
        """Add a batch of whole sequences [n, S, channels]."""
        self._sum += self._summand(activations.float()).double().cpu()

    def merge(self, other: ChannelStatistic) -> None:
        """Add what another process saw."""
        self._sum += other._sum

    @abstractmethod
    def _summand(self, activations: torch.Tensor) -> torch.Tensor:
        """Return what a batch adds to the sum, fp32 [channels]."""

    @abstractmethod
    def result(self) -> torch.Tensor:
        """Return the statistic, float64 [channels]."""


class Energy(ChannelStatistic):
    """Sum over sequences and tokens of the squared activation, as llm-pruning-collection's width pruning takes it."""

    def _summand(self, activations: torch.Tensor) -> torch.Tensor:
        return activations.square().sum(dim=(0, 1))

    def result(self) -> torch.Tensor:
        """Return the energies, float64 [channels]."""
        return self._sum.clone()


class MeanAbsL2(ChannelStatistic):
    """L2 norm over sequences of the mean absolute activation over tokens: ``sqrt(sum_n (mean_t |x_ntc|)^2)``.

    The aggregation of Minitron (Muralidharan et al., 2407.14679) as ModelOpt computes it. Sequences must be
    whole: the square of a mean is not the sum of its parts' squares.
    """

    def _summand(self, activations: torch.Tensor) -> torch.Tensor:
        return activations.abs().mean(dim=1).square().sum(dim=0)

    def result(self) -> torch.Tensor:
        """Return the norms, float64 [channels]."""
        return self._sum.sqrt()


class CosineDistance:
    """Mean over tokens of 1 - cos(input, output): a layer's block influence (ShortGPT, 2403.03853, equation 1).

    Dot products and norms are fp32: in bf16 a cosine near 1 has steps of 2^-8, and middle layers tie.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._tokens = 0

    def update(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add a batch of hidden states in front of and behind the layer, both [n, S, d]."""
        x, y = inputs.float(), outputs.float()
        dot, x_square, y_square = ((a * b).sum(dim=-1).double() for a, b in ((x, y), (x, x), (y, y)))
        cosine = dot / (x_square * y_square).sqrt().clamp(min=1e-8)
        self._sum += float((1 - cosine).sum())
        self._tokens += dot.numel()

    def merge(self, other: CosineDistance) -> None:
        """Add what another process saw."""
        self._sum += other._sum
        self._tokens += other._tokens

    def result(self) -> float:
        """Return the mean distance."""
        return self._sum / self._tokens
