"""Statistics of activations that can be updated batch by batch, and merged or summed over ranks.

Sums are in fp32 within a batch and in fp64 across batches, so the result depends on the batching only by fp32
rounding. Sums stay on the device of the activations until they are asked for: reading one would keep this process
waiting for the device in every batch. In bf16 a sum of equal terms would stop growing after 256 of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from nemo_pvs.system import ranks


class ChannelStatistic(ABC):
    """A statistic with one number per channel, held as a float64 sum [channels]."""

    def __init__(self, channels: int) -> None:
        self._sum = torch.zeros(channels, dtype=torch.float64)

    def update(self, activations: torch.Tensor) -> None:
        """Add a batch of whole sequences [n, S, channels]."""
        summand = self._summand(activations.float()).double()
        self._sum = self._sum.to(summand.device).add_(summand)

    def merge(self, other: ChannelStatistic) -> None:
        """Add another process's statistic."""
        self._sum += other._sum

    def all_reduce(self) -> None:
        """Combine the statistics of all ranks, on every rank."""
        self._sum = ranks.all_reduce(self._sum.cpu())

    @abstractmethod
    def _summand(self, activations: torch.Tensor) -> torch.Tensor:
        """Return a batch's contribution to the sum, fp32 [channels]."""

    @abstractmethod
    def result(self) -> torch.Tensor:
        """Return the statistic, float64 [channels]."""


class Energy(ChannelStatistic):
    """Sum over sequences n and tokens t of the squared activation of each channel c: ``sum_nt x_ntc^2``.

    The aggregation of llm-pruning-collection's width pruning, with which the runs of 2606.14150 were made.
    """

    def _summand(self, activations: torch.Tensor) -> torch.Tensor:
        return activations.square().sum(dim=(0, 1))

    def result(self) -> torch.Tensor:
        """Return the energies, float64 [channels]."""
        return self._sum.to("cpu", copy=True)


class MeanAbsL2(ChannelStatistic):
    """L2 norm over sequences of the mean absolute activation over tokens: ``sqrt(sum_n (mean_t |x_ntc|)^2)``.

    The aggregation of Minitron (Muralidharan et al., 2407.14679) as ModelOpt computes it. Sequences must be
    whole: the square of a mean is not the sum of its parts' squares.
    """

    def _summand(self, activations: torch.Tensor) -> torch.Tensor:
        return activations.abs().mean(dim=1).square().sum(dim=0)

    def result(self) -> torch.Tensor:
        """Return the norms, float64 [channels]."""
        return self._sum.cpu().sqrt()


class CosineDistance:
    """Mean over tokens of 1 - cos(input, output): a layer's block influence (ShortGPT, 2403.03853, equation 1).

    Dot products and norms are fp32: in bf16 a cosine near 1 has steps of 2^-8, and middle layers tie.
    """

    def __init__(self) -> None:
        self._sum = torch.zeros((), dtype=torch.float64)
        self._tokens = 0

    def update(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add a batch of hidden states before and after the layer, both [n, S, d]."""
        x, y = inputs.float(), outputs.float()
        dot, x_square, y_square = ((a * b).sum(dim=-1).double() for a, b in ((x, y), (x, x), (y, y)))
        cosine = dot / (x_square * y_square).sqrt().clamp(min=1e-8)
        self._sum = self._sum.to(cosine.device) + (1 - cosine).sum()
        self._tokens += dot.numel()

    def merge(self, other: CosineDistance) -> None:
        """Add another process's statistic."""
        self._sum += other._sum
        self._tokens += other._tokens

    def all_reduce(self) -> None:
        """Combine the statistics of all ranks, on every rank."""
        total = ranks.all_reduce(torch.tensor([float(self._sum), self._tokens], dtype=torch.float64))
        self._sum, self._tokens = total[0], int(total[1])

    def result(self) -> float:
        """Return the mean distance."""
        return float(self._sum) / self._tokens


class Moments:
    """Mean and variance over all tokens for each channel, and FLAP's recurrence for the latter.

    Within a sequence squared deviations from its mean are summed in fp32, so a large mean does not cancel a small
    variance; sequences, all of one length S, are combined in float64 by the formulas of Chan, Golub and LeVeque
    (1983).
    """

    def __init__(self, channels: int) -> None:
        self._sequences = 0
        self._tokens = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)
        self._recurrence: torch.Tensor | None = torch.zeros(channels, dtype=torch.float64)

    def update(self, activations: torch.Tensor) -> None:
        """Add a batch of whole sequences [n, S, channels]."""
        x = activations.float()
        sequence_means = x.mean(dim=1)
        squares = (x - sequence_means[:, None]).square_().sum(dim=1).double()
        means = sequence_means.double()
        sequences, length = x.shape[:2]
        number = torch.arange(self._sequences + 1, self._sequences + sequences + 1, device=x.device).double()[:, None]
        self._move(x.device)
        after = (self._mean * self._sequences + means.cumsum(dim=0)) / number  # mean of sequences 1 to n
        before = torch.cat([self._mean[None], after[:-1]])
        self._squares += (squares + length * (means - before) * (means - after)).sum(dim=0)
        if self._recurrence is not None:
            self._recurrence += ((squares + length * (means - after).square()) * (1 - 1 / number)).sum(dim=0)
        self._mean = after[-1]
        self._sequences += sequences
        self._tokens += sequences * length

    def _move(self, device: torch.device) -> None:
        self._mean, self._squares = self._mean.to(device), self._squares.to(device)
        if self._recurrence is not None:
            self._recurrence = self._recurrence.to(device)

    def merge(self, other: Moments) -> None:
        """Add another process's moments; the recurrence, which depends on the order of sequences, is lost."""
        tokens = self._tokens + other._tokens
        difference = other._mean - self._mean
        self._squares += other._squares + difference.square() * (self._tokens * other._tokens / tokens)
        self._mean = self._mean + difference * (other._tokens / tokens)
        self._sequences, self._tokens = self._sequences + other._sequences, tokens
        self._recurrence = None

    def all_reduce(self) -> None:
        """Combine the moments of all ranks, on every rank; with more than one rank the recurrence is lost."""
        if ranks.world_size() == 1:
            return
        self._move(torch.device("cpu"))
        counts = ranks.all_reduce(torch.tensor([self._sequences, self._tokens]))
        mean = ranks.all_reduce(self._mean * self._tokens) / counts[1]
        self._squares = ranks.all_reduce(self._squares + self._tokens * (self._mean - mean).square())
        self._mean, self._recurrence = mean, None
        self._sequences, self._tokens = counts.tolist()

    def mean(self) -> torch.Tensor:
        """Return the mean over tokens, float64 [channels]."""
        return self._mean.to("cpu", copy=True)

    def variance(self) -> torch.Tensor:
        """Return the unbiased variance over tokens, float64 [channels]: FLAP's fluctuation (2312.11983)."""
        return self._squares.cpu() / max(1, self._tokens - 1)

    def fluctuation(self) -> torch.Tensor | None:
        """Return the fluctuation as FLAP's script computes it, float64 [channels]; None after merging.

        CASIA-IVA-Lab/FLAP updates the variance of its paper (2312.11983) with a mean that already includes the new
        sequence, and drops the first one. With D_n the sum over the tokens of sequence n of the squared distance from
        the mean of sequences 1 to n, that is ``sum_{n=2..N} D_n (n - 1) / n / (N - 1)``. It depends on the order of
        the sequences.
        """
        return None if self._recurrence is None else self._recurrence.cpu() / max(1, self._sequences - 1)
