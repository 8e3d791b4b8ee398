"""SparseGPT: prune a matrix column by column, compensated by the columns to the right (2301.00774).

Removing w_i from a row of W [outputs, inputs] changes the weights from i on by ``-(w_i / A_00) A[:, 0]``: the step of
Optimal Brain Surgeon, where A is the inverse of ``H[i:, i:]`` and H the Hessian of the layer's squared error. One
triangular factor U with ``U^T U = H^-1`` holds all those inverses: ``A_00 = U_ii^2`` and ``A[:, 0] = U_ii U[i, i:]``.
Names follow the paper's code, which calls U ``Hinv`` and the weighted errors ``w_i / U_ii`` ``err``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.sparse.sparsity import Sparsity, lowest, lowest_in_groups, up_to_threshold

_STRIP = 256  # rows of the Hessian computed at once: only the upper triangle of blocks, which halves the work
_STEP = 16  # columns of an unstructured block between two updates of the columns ahead
_LARGEST_DAMPING = 1000.0  # times the mean of the diagonal: then H is practically diagonal


class Hessian:
    """The sum of ``x x^T`` over all tokens, in fp32 (fp64 for fp64 activations), on the activations' device.

    It is X X^T for the inputs X [channels, tokens]; H in the paper's code is this times 2 / N (``SparseGPT.pruner``).
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._upper: torch.Tensor | None = None

    def update(self, activations: torch.Tensor) -> None:
        """Add a batch of activations [..., channels]."""
        tokens = activations.flatten(0, -2)
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        if self._upper is None:
            self._upper = tokens.new_zeros(self._channels, self._channels)
        # A bf16 matrix product multiplies bf16 numbers exactly and accumulates in fp32.
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
    """The factorised inverse Hessian of an input, shared by all matrices that read it."""

    upper: torch.Tensor
    """U, upper triangular [inputs, inputs]: ``U^T U`` is the inverse of the damped Hessian."""
    dead: torch.Tensor
    """Input channels that are always zero, bool [inputs]."""


def inverse_factor(
    hessian: torch.Tensor, damping: float = 0.01, warn: Callable[[str], None] = lambda _: None
) -> InverseFactor:
    """Factorise the inverse of a Hessian, after setting the diagonal of dead inputs to one and damping all of it.

    With J the reversal of rows and columns, ``J H J = L L^T`` gives ``U = J L^-1 J``: this takes one Cholesky
    factorisation and never forms the inverse of H.

    Args:
        hessian: H [inputs, inputs].
        damping: Share of the diagonal's mean that is added to the diagonal; multiplied by ten, with a warning, until H
            is positive definite in this precision (it may not be with fewer tokens than inputs).
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
    raise UserError("The Hessian of the calibration data cannot be inverted; calibrate with more or other text.")


def _reversed(hessian: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Return a copy with rows and columns reversed and ``added`` [inputs], in original order, on the diagonal."""
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
    """Return the pruned matrix in its own dtype and the mask of kept weights, bool [outputs, inputs].

    The weights with the least ``w^2 / U_ii^2`` are removed. For an unstructured ratio these are exactly
    ``int(n * ratio)`` of the n weights of each block of columns, chosen when the block begins; for N:M the N least of
    each row's M, chosen when the group begins, after compensation for everything to its left. Of equal scores the
    first in row-major order is removed.

    Args:
        weight: W [outputs, inputs].
        factor: Factor of the inputs' Hessian; its dtype is the compute dtype.
        sparsity: How many weights to remove.
        block: Columns over which weights are chosen together, and after which the rest of the matrix is updated.
        compat: Choose unstructured weights up to a threshold as IST-DASLab/sparsegpt does, which removes one more
            weight per block and all that tie with it.
        fixed: Remove the weights where this is true instead of choosing, bool [outputs, inputs].
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
    """Prune several matrices that read the same input together; return what ``sparsegpt`` does for each.

    Rows are independent except for the choice of weights, which is made for each matrix separately.

    Args:
        weights: Matrices [outputs, inputs]; outputs may differ.
        factor: Factor of the inputs' Hessian; its dtype is the compute dtype.
        sparsity: How many weights to remove from each matrix.
        block: Columns over which weights are chosen together, and after which the rest of the matrices is updated.
        compat: Choose unstructured weights up to a threshold.
        fixed: Remove the weights where this is true instead of choosing, bool [outputs of all matrices, inputs].
    """
    outputs = [len(weight) for weight in weights]
    Hinv = factor.upper  # [inputs, inputs]
    # W is held transposed, so that its columns, the inputs, are contiguous.
    W = Hinv.new_empty(len(Hinv), sum(outputs))  # [inputs, outputs of all matrices]
    torch.cat([weight.T.to(W) for weight in weights], dim=1, out=W)
    W[factor.dead] = 0
    removed = torch.empty_like(W, dtype=torch.bool) if fixed is None else fixed.T.contiguous()  # as W
    group = sparsity.pattern[1] if sparsity.pattern else block
    width = max(group, block // group * group)
    step = group if sparsity.pattern else min(_STEP, block)
    with _full_precision():
        for start in range(0, len(W), width):
            # Views of one block of w <= width inputs.
            W1, removed1 = W[start : start + width], removed[start : start + width]  # [w, outputs of all matrices]
            end = start + len(W1)
            Hinv1 = Hinv[start:end, start:end]  # [w, w]
            err = torch.zeros_like(W1)  # w_i / U_ii where removed, otherwise 0 [w, outputs of all matrices]
            for first in range(0, len(W1), step):
                # Updates are lazy: a column receives the errors of earlier steps when its own step begins.
                ahead = slice(first, first + step)
                W1[ahead].addmm_(Hinv1[:first, ahead].T, err[:first], alpha=-1)
                if fixed is None and first % group == 0:
                    choice = slice(first, first + group)
                    scores = (W1[choice] / Hinv1.diagonal()[choice, None]).square()
                    for mask, score in zip(removed1[choice].split(outputs, 1), scores.split(outputs, 1), strict=True):
                        mask.copy_(_choose(score.T, sparsity, compat).T)
                factors = removed1[ahead] / Hinv1.diagonal()[ahead, None]  # 1 / U_ii where removed, otherwise 0
                for i, row in enumerate(factors, start=first):
                    W1[i].addmv_(err[first:i].T, Hinv1[first:i, i], alpha=-1)
                    torch.mul(W1[i], row, out=err[i])
            W1.masked_fill_(removed1, 0)
            W[end:].addmm_(Hinv[start:end, end:].T, err, alpha=-1)
    results = []
    for weight, pruned, mask in zip(weights, W.split(outputs, 1), removed.split(outputs, 1), strict=True):
        results.append((pruned.T.to(weight.dtype).contiguous(), ~mask.T.contiguous()))
    return results


def _choose(scores: torch.Tensor, sparsity: Sparsity, compat: bool) -> torch.Tensor:
    """Return the mask of weights to remove, bool [outputs, columns]."""
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
    """Share of the diagonal's mean that is added to the Hessian's diagonal; the value of the paper's code."""
    block: int = 128
    """Columns over which weights are chosen together; the paper's B_s."""
    compat: bool = False
    """Prune up to thresholds, as the paper's code does."""

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the result depends on."""
        return {
            "method": "sparsegpt",
            "sparsity": str(self.sparsity),
            "damping": self.damping,
            "block": self.block,
            "compat": self.compat,
        }

    def statistic(self, channels: int) -> Hessian:
        """Return an empty Hessian of an input with ``channels`` channels."""
        return Hessian(channels)

    def pruner(
        self, total: torch.Tensor, sequences: int, warn: Callable[[str], None]
    ) -> Callable[[Sequence[torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return a function from all matrices that read one input to (pruned matrix, mask) of each.

        Args:
            total: Sum of ``x x^T`` over all tokens [inputs, inputs]; it is overwritten.
            sequences: Number of calibration sequences (N); in the paper's code H is ``2 / N`` times the sum.
            warn: Called with one sentence when the Hessian needs more damping.

        Raises:
            UserError: the Hessian cannot be inverted.
        """
        factor = inverse_factor(total.mul_(2 / sequences), self.damping, warn)
        return lambda weights: sparsegpt_all(weights, factor, self.sparsity, block=self.block, compat=self.compat)


@contextmanager
def _full_precision(precision: str = "highest") -> Iterator[None]:
    """Multiply fp32 matrices in full fp32, not TF32 or bf16, unless ``precision`` is ``medium``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
