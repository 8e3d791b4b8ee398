"""Second-order compensation for removed columns of a matrix (Optimal Brain Surgeon, 1992).

The squared error of the output of a matrix W over the tokens is least if the kept weights absorb what the kept inputs
predict of the removed ones: with H the sum of ``x x^T``, ``W_kept += W_gone (H_kept^-1 H_kept,gone)^T``. For one
column that is the step ``-w_c / [H^-1]_cc [H^-1]_c`` of SparseGPT (2301.00774); here it is taken for several at once.
EfficientLLM (2502.06663) mentions a local Hessian but no damping; with few tokens H needs much of it.
"""

from __future__ import annotations

import torch

from nemo_pvs.errors import UserError

_LARGEST_DAMPING = 1000.0


def predictors(hessian: torch.Tensor, gone: torch.Tensor, kept: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Return the coefficients by which kept inputs predict removed ones: float64 [inputs, gone], zero for others.

    A matrix W [outputs, inputs] that loses the columns ``gone`` is compensated by ``W += W[:, gone] @ result.T``.

    Args:
        hessian: Sum of ``x x^T`` over tokens [inputs, inputs].
        gone: Indices of the inputs to remove now, int64 [gone]; none of them is kept.
        kept: Which inputs are kept, bool [inputs].
        damping: Share of the diagonal's mean over the kept inputs that is added to the diagonal; multiplied by ten
            until H is positive definite in float64.

    Raises:
        UserError: no damping helps.
    """
    wide = hessian.double()
    result = wide.new_zeros(len(wide), len(gone))
    stay = (kept & (wide.diagonal() > 0)).nonzero().flatten()
    if not len(stay):
        return result
    square = wide.index_select(0, stay).index_select(1, stay)
    cross = wide.index_select(0, stay).index_select(1, gone)
    mean = square.diagonal().mean()
    while damping <= _LARGEST_DAMPING:
        damped = square.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            solved = torch.cholesky_solve(cross, lower)
            if bool(solved.isfinite().all()):
                return result.index_copy_(0, stay, solved)
        damping = 10 * damping if damping else 0.01
    raise UserError("The Hessian of a layer's inputs cannot be inverted; the activations are not finite.")
