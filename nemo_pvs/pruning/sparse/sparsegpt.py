"""SparseGPT: prune a matrix column by column and let the columns to the right make up for it (2301.00774).

Removing w_i of a row of W [outputs, inputs] changes the weights to its right by ``-(w_i / A_00) A[:, 0]``: the step of
Optimal Brain Surgeon, with A the inverse of the Hessian H of the layer's squared error without what is left of i. All
those inverses are in one triangular factor U, ``U^T U = H^-1``: ``A_00 = U_ii^2`` and ``A[:, 0] = U_ii U[i, i:]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.sparse.sparsity import Sparsity, lowest, lowest_in_groups, up_to_threshold

_STRIP = 256  # rows of the Hessian computed at once: only the upper triangle of blocks, half of the work
_STEP = 16  # columns of an unstructured block that are made up for together
_LARGEST_DAMPING = 1000.0  # times the mean diagonal: then H is as good as diagonal


class Hessian:
    """The sum of ``x x^T`` over all tokens, fp32 (or fp64, if the activations are), on the activations' device."""

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._upper: torch.Tensor | None = None

    def update(self, activations: torch.Tensor) -> None:
        """Add a batch of activations [..., channels]."""
        tokens = activations.flatten(0, -2)
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        if self._upper is None:
            self._upper = tokens.new_zeros(self._channels, self._channels)
        # Products of bf16 numbers are exact in bf16 arithmetic, which adds them up in fp32.
        exact_in_bf16 = activations.dtype == torch.bfloat16 and activations.device.type == "cpu"
        with _full_precision("medium" if exact_in_bf16 else "highest"):
            for start in range(0, self._channels, _STRIP):
                rows = tokens[:, start : start + _STRIP]
                self._upper[start : start + _STRIP, start:].addmm_(rows.T, tokens[:, start:])

    def result(self) -> torch.Tensor:
        """Return the sum [channels, channels]; the lower triangle mirrors the upper one."""
        if self._upper is None:
            return torch.zeros(self._channels, self._channels)
        return self._upper.triu_().add_(self._upper.triu(1).T)


@dataclass(frozen=True)
class InverseFactor:
    """What a Hessian knows about pruning, for every matrix that reads the same input."""

    upper: torch.Tensor
    """U, upper triangular [inputs, inputs]: ``U^T U`` is the inverse of the damped Hessian."""
    dead: torch.Tensor
    """Inputs that are always zero, bool [inputs]."""


def inverse_factor(
    hessian: torch.Tensor, damping: float = 0.01, warn: Callable[[str], None] = lambda _: None
) -> InverseFactor:
    """Factorise the inverse of a Hessian; the diagonal gets ``damping`` times its mean, dead inputs a one before.

    Reversing rows and columns turns the upper factor of the inverse into the inverse of a lower factor:
    ``J H J = L L^T`` gives ``U = J L^-1 J``. One Cholesky, and the inverse of H is never formed.

    Args:
        hessian: [inputs, inputs].
        damping: Share of the mean of the diagonal; grows tenfold, with a warning, for as long as H is not positive
            definite in this precision (fewer tokens than inputs).
        warn: Called with one sentence.

    Raises:
        UserError: no damping helps.
    """
    dead = hessian.diagonal() == 0
    mean = float((hessian.diagonal() + dead).mean())
    while damping <= _LARGEST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(_reversed(hessian, dead.to(hessian.dtype) + damping * mean))
        if not failed:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if bool(upper.isfinite().all()):
                return InverseFactor(upper, dead)
        damping = 10 * damping if damping else 0.01
        warn(f"the Hessian is not positive definite; trying again with damping {damping:g}")
    raise UserError("The Hessian of the calibration data cannot be inverted; calibrate with more and other text.")


def _reversed(hessian: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Return a copy in reverse order with something added to the diagonal (given in the order of the Hessian)."""
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(added.flip(0))
    return damped


def sparsegpt(
    weight: torch.Tensor,
    factor: InverseFactor,
    sparsity: Sparsity,
    *,
    block: int = 128,
    compat: bool = False,
    fixed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pruned matrix in its own dtype, and which weights stay, bool [outputs, inputs].

    The weights of least ``w^2 / U_ii^2`` go: of an unstructured ratio exactly ``int(n * ratio)`` of the n weights of
    each block of columns, chosen when the block begins; of N:M the N least of each row's M, chosen when the group
    begins, after everything to its left has been made up for. Ties go to the first weight of the first row.

    Args:
        weight: [outputs, inputs].
        factor: From the inputs' Hessian; its dtype is the computing type.
        sparsity: How many go.
        block: Columns that choose together; also those after which the rest of the matrix is updated.
        compat: Choose the unstructured weights up to a threshold as IST-DASLab/sparsegpt does; that removes one
            weight more a block, and all that tie with it.
        fixed: Prune where this is true instead of choosing, bool [outputs, inputs].
    """
    ((pruned, kept),) = sparsegpt_all([weight], factor, sparsity, block=block, compat=compat, fixed=fixed)
    return pruned, kept


def sparsegpt_all(
    weights: Sequence[torch.Tensor],
    factor: InverseFactor,
    sparsity: Sparsity,
    *,
    block: int = 128,
    compat: bool = False,
    fixed: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what ``sparsegpt`` does for each of several matrices that read the same input, in one go.

    Rows do not depend on each other but for the choice, and that is made for each matrix alone.

    Args:
        weights: Matrices [outputs, inputs].
        factor: As there, and so all others.
        sparsity: How many go of each matrix.
        block: Columns that choose together.
        compat: Choose up to a threshold.
        fixed: Prune where this is true, bool [outputs of all matrices, inputs].
    """
    outputs = [len(weight) for weight in weights]
    # A transposed copy, so that a column of W is contiguous.
    work = factor.upper.new_empty(len(factor.upper), sum(outputs))
    torch.cat([weight.T.to(work) for weight in weights], dim=1, out=work)
    work[factor.dead] = 0
    removed = torch.empty_like(work, dtype=torch.bool) if fixed is None else fixed.T.contiguous()
    group = sparsity.pattern[1] if sparsity.pattern else block
    width = max(group, block // group * group)
    step = group if sparsity.pattern else min(_STEP, block)
    with _full_precision():
        for start in range(0, len(work), width):
            columns, goes = work[start : start + width], removed[start : start + width]
            end = start + len(columns)
            upper = factor.upper[start:end, start:end]
            # An error weighted by U is subtracted from a column only when the turn of its step comes.
            errors = torch.zeros_like(columns)
            for first in range(0, len(columns), step):
                ahead = slice(first, first + step)
                columns[ahead].addmm_(upper[:first, ahead].T, errors[:first], alpha=-1)
                if fixed is None and first % group == 0:
                    chooses = slice(first, first + group)
                    scores = (columns[chooses] / upper.diagonal()[chooses, None]).square()
                    for place, own in zip(goes[chooses].split(outputs, 1), scores.split(outputs, 1), strict=True):
                        place.copy_(_choose(own.T, sparsity, compat).T)
                shares = goes[ahead] / upper.diagonal()[ahead, None]
                for i, share in enumerate(shares, start=first):
                    columns[i].addmv_(errors[first:i].T, upper[first:i, i], alpha=-1)
                    torch.mul(columns[i], share, out=errors[i])
            columns.masked_fill_(goes, 0)
            work[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)
    return [
        (pruned.T.to(weight.dtype).contiguous(), ~gone.T.contiguous())
        for weight, pruned, gone in zip(weights, work.split(outputs, 1), removed.split(outputs, 1), strict=True)
    ]


def _choose(scores: torch.Tensor, sparsity: Sparsity, compat: bool) -> torch.Tensor:
    """Return which weights go, bool [outputs, columns]."""
    if sparsity.pattern:
        return lowest_in_groups(scores, sparsity.pattern)
    if compat:
        return up_to_threshold(scores, int(scores.numel() * sparsity.ratio))
    return lowest(scores.flatten(), sparsity.count(scores.numel())).view(scores.shape)


@dataclass(frozen=True)
class SparseGPT:
    """The method for ``sequential.prune_layers``."""

    sparsity: Sparsity
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean; the value of the paper's code."""
    block: int = 128
    """Columns that choose together; the paper's B_s."""
    compat: bool = False
    """Prune up to thresholds, as the paper's code does."""

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes one run of the method from another."""
        return {
            "method": "sparsegpt",
            "sparsity": str(self.sparsity),
            "damping": self.damping,
            "block": self.block,
            "compat": self.compat,
        }

    def statistic(self, channels: int) -> Hessian:
        """Return an empty statistic of an input with so many channels."""
        return Hessian(channels)

    def pruner(
        self, total: torch.Tensor, sequences: int, warn: Callable[[str], None]
    ) -> Callable[[Sequence[torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return a function from all matrices that read one input to (the pruned matrix, its mask) of each.

        Args:
            total: Sum of ``x x^T`` over all tokens [inputs, inputs]; it is overwritten.
            sequences: Number of calibration sequences (N); the paper's code has ``H = 2 / N`` times the sum.
            warn: Called with one sentence when the Hessian needs more damping.

        Raises:
            UserError: the Hessian cannot be inverted.
        """
        factor = inverse_factor(total.mul_(2 / sequences), self.damping, warn)
        return lambda weights: sparsegpt_all(weights, factor, self.sparsity, block=self.block, compat=self.compat)


@contextmanager
def _full_precision(precision: str = "highest") -> Iterator[None]:
    """Multiply fp32 matrices as fp32: neither TF32 nor bf16 behind the scenes, unless ``medium`` allows it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
