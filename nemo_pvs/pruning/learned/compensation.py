"""Second-order compensation: what is left of a matrix makes up for columns that go (Optimal Brain Surgeon, 1992).

The output of a matrix W changes least, in squares over the tokens, if the weights that stay take over what the
inputs that stay predict of those that go: with H the sum of ``x x^T``, ``W_kept += W_gone (H_kept^-1 H_kept,gone)^T``.
For one column that is the step ``-w_c / [H^-1]_cc [H^-1]_c`` of SparseGPT (2301.00774), here of several at once.
EfficientLLM (2502.06663) speaks of a local Hessian and gives no damping; few tokens want much of it.
"""

from __future__ import annotations

import torch

from nemo_pvs.errors import UserError

_LARGEST_DAMPING = 1000.0


def predictors(hessian: torch.Tensor, gone: torch.Tensor, kept: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Return how inputs that stay predict those that go: float64 [inputs, gone], zero beside the kept ones.

    A matrix W [outputs, inputs] without its columns ``gone`` then gets ``W += W[:, gone] @ result.T``.

    Args:
        hessian: Sum of ``x x^T`` over tokens [inputs, inputs].
        gone: Places of the inputs that go now, int64; none of them is kept.
        kept: Which stay, bool [inputs].
        damping: Share of the mean of the diagonal over the inputs that stay, added to it; grows tenfold for as long as
            H is singular in float64.

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
