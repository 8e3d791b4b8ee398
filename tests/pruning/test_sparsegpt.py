"""SparseGPT against closed forms and against a slow float64 oracle that inverts a matrix for every weight."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.sparse.sparsegpt import (
    Hessian,
    InverseFactor,
    SparseGPT,
    inverse_factor,
    sparsegpt,
    sparsegpt_all,
)
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.sparse.wanda import wanda_mask

Array = npt.NDArray[np.float64]

X = np.array([[1.0, 2, 0, 1], [0, 1, 1, 2], [1, 0, 2, 1]])
W = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)


def factor_of(x: Array, damping: float = 0.0, scale: float = 1.0) -> InverseFactor:
    return inverse_factor(torch.from_numpy(scale * x @ x.T), damping)


def correlated(channels: int, tokens: int, seed: int = 0) -> Array:
    """Activations [channels, tokens] whose channels have much in common and very different sizes."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(channels, channels)) * np.exp(random.normal(size=(channels, 1)))
    return mixing @ random.normal(size=(channels, tokens))


def weights(rows: int, columns: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def oracle(weight: Array, hessian: Array, zeros: int | float, group: int) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Choose and make up column by column, with a fresh inverse of what is left.

    ``zeros`` of each row's ``group`` columns as a whole number, or that share of all rows and ``group`` columns.
    """
    w, gone = weight.copy(), np.zeros(weight.shape, dtype=bool)
    columns = w.shape[1]
    inverses = [np.linalg.inv(hessian[i:, i:]) for i in range(columns)]
    for i in range(columns):
        if i % group == 0:
            ahead = range(i, min(i + group, columns))
            scores = np.stack([w[:, j] ** 2 / inverses[j][0, 0] for j in ahead], axis=1)
            if isinstance(zeros, int):
                for row in range(len(w)):
                    gone[row, [i + at for at in np.argsort(scores[row], kind="stable")[:zeros]]] = True
            else:
                order = np.argsort(scores.flatten(), kind="stable")[: int(scores.size * zeros)]
                gone[order // len(ahead), i + order % len(ahead)] = True
        step = np.where(gone[:, i], w[:, i] / inverses[i][0, 0], 0)
        w[:, i:] -= np.outer(step, inverses[i][:, 0])
        w[gone[:, i], i] = 0
    return w, gone


def squared_error(weight: Array, pruned: Array, x: Array) -> float:
    return float((((weight - pruned) @ x) ** 2).sum())


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(("gone", "expected"), [([0], [0, -0.6, 1.9]), ([1], [0.5, 0, 4 / 3]), ([0, 2], [0, -0.6, 0])])
def test_golden_steps(gone: list[int], expected: list[float], scale: float) -> None:
    """2 / N in front of H scales every score and no weight."""
    fixed = torch.zeros(1, 3, dtype=torch.bool)
    fixed[0, gone] = True
    pruned, kept = sparsegpt(W, factor_of(X, scale=scale), Sparsity(0.5), fixed=fixed)
    np.testing.assert_allclose(pruned[0].numpy(), expected, atol=1e-12)
    assert torch.equal(kept, ~fixed)


def test_golden_factor_scores_and_error() -> None:
    factor = factor_of(X)
    expected = [[0.559017, -0.447214, 0.111803], [0, 0.547723, -0.365148], [0, 0, 0.408248]]
    np.testing.assert_allclose(factor.upper.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose((W[0] / factor.upper.diagonal()) ** 2, [0.8, 10 / 3, 24], atol=1e-6)
    pruned, kept = sparsegpt(W, factor, Sparsity(0.34))
    assert kept.tolist() == [[False, True, True]]
    assert squared_error(W.numpy(), pruned.numpy(), X) == pytest.approx(0.8)


def test_the_given_matrix_is_not_changed() -> None:
    for weight in (W, torch.from_numpy(weights(3, 4)).T.contiguous().T[:, :3]):
        before = weight.clone()
        sparsegpt(weight, factor_of(X), Sparsity(0.5))
        assert torch.equal(weight, before)


def test_one_column_is_the_least_squares_optimum() -> None:
    x, w = correlated(8, 40), weights(5, 8)
    fixed = torch.zeros(5, 8, dtype=torch.bool)
    fixed[:, 0] = True
    pruned, _ = sparsegpt(torch.from_numpy(w), factor_of(x), Sparsity(0.5), fixed=fixed)
    best = np.linalg.lstsq(x[1:].T, (w @ x).T, rcond=None)[0].T
    np.testing.assert_allclose(pruned[:, 1:].numpy(), best, rtol=1e-8)
    inverse = np.linalg.inv(x @ x.T)
    assert squared_error(w, pruned.numpy(), x) == pytest.approx(float((w[:, 0] ** 2 / inverse[0, 0]).sum()))


def test_the_factor_holds_every_conditional_inverse() -> None:
    x = correlated(24, 60)
    upper = factor_of(x).upper.numpy()
    for i in range(24):
        inverse = np.linalg.inv((x @ x.T)[i:, i:])
        assert upper[i, i] ** 2 == pytest.approx(inverse[0, 0], rel=1e-9)
        np.testing.assert_allclose(upper[i, i:] / upper[i, i], inverse[0] / inverse[0, 0], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(upper.T @ upper @ (x @ x.T), np.eye(24), atol=1e-8)
    assert np.array_equal(upper, np.triu(upper))


@pytest.mark.parametrize(
    ("sparsity", "zeros", "group", "block"),
    [
        ("0.5", 0.5, 8, 8),
        ("0.3", 0.3, 16, 16),
        ("0.6", 0.6, 128, 128),
        ("2:4", 2, 4, 8),
        ("4:8", 4, 8, 128),
        ("1:3", 1, 3, 8),
    ],
)
def test_the_whole_algorithm(sparsity: str, zeros: int | float, group: int, block: int) -> None:
    """Widths that the block does not divide, and groups that do not divide the block, are among these."""
    columns = 36 if group == 3 else 40
    x, w = correlated(columns, 90), weights(11, columns)
    expected, gone = oracle(w, x @ x.T, zeros, group)
    pruned, kept = sparsegpt(torch.from_numpy(w), factor_of(x), Sparsity.parse(sparsity), block=block)
    assert np.array_equal(~kept.numpy(), gone)
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-8, atol=1e-9)
    assert (pruned.numpy()[gone] == 0).all()
    if group <= 8:
        assert squared_error(w, pruned.numpy(), x) <= squared_error(w, np.where(gone, 0, w), x)


def test_the_order_of_errors() -> None:
    """Never better than the best weights for the same mask, never worse than leaving the others alone."""
    x, w = correlated(16, 50), weights(4, 16)
    pruned, kept = sparsegpt(torch.from_numpy(w), factor_of(x), Sparsity(0.5), block=16)
    joint = np.zeros_like(w)
    for row, stays in enumerate(kept.numpy()):
        joint[row, stays] = np.linalg.lstsq(x[stays].T, w[row] @ x, rcond=None)[0]
    error = squared_error(w, pruned.numpy(), x)
    assert squared_error(w, joint, x) < error < squared_error(w, np.where(kept.numpy(), w, 0), x)


@pytest.mark.parametrize("block", [4, 16, 20, 64])
def test_blocks_only_delay_the_updates(block: int) -> None:
    x, w = correlated(64, 150), torch.from_numpy(weights(9, 64))
    factor = factor_of(x)
    fixed = torch.rand(9, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    for sparsity, mask in ((Sparsity(0.5), fixed), (Sparsity.parse("2:4"), None)):
        whole, whole_kept = sparsegpt(w, factor, sparsity, block=1000, fixed=mask)
        pruned, kept = sparsegpt(w, factor, sparsity, block=block, fixed=mask)
        assert torch.equal(kept, whole_kept)
        torch.testing.assert_close(pruned, whole, rtol=1e-9, atol=1e-10)


def test_independent_inputs_of_one_size_give_magnitude_pruning() -> None:
    w = torch.from_numpy(weights(12, 32))
    factor = inverse_factor(3 * torch.eye(32, dtype=torch.float64))
    pruned, kept = sparsegpt(w, factor, Sparsity(0.5), block=32)
    order = np.argsort(np.abs(w.numpy()).flatten())[: 12 * 16]
    assert sorted(order) == np.flatnonzero(~kept.numpy()).tolist()
    assert torch.equal(pruned, torch.where(kept, w, 0.0))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_independent_inputs_give_wandas_groups(pattern: str) -> None:
    w = torch.from_numpy(weights(12, 32)).float()
    squares = torch.from_numpy(np.random.default_rng(5).exponential(size=32)).float()
    pruned, kept = sparsegpt(w, inverse_factor(2 * squares.diag(), damping=0), Sparsity.parse(pattern))
    assert torch.equal(kept, wanda_mask(w, squares, Sparsity.parse(pattern)))
    assert torch.equal(pruned, torch.where(kept, w, 0.0))


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_dead_inputs_lose_their_weights(sparsity: str) -> None:
    x = correlated(16, 60)
    x[[3, 4]] = 0
    pruned, kept = sparsegpt(torch.from_numpy(weights(6, 16)), factor_of(x, 0.01), Sparsity.parse(sparsity))
    assert (pruned[:, [3, 4]] == 0).all()
    assert pruned.isfinite().all()
    assert int((~kept).sum()) == 6 * 8


def test_fewer_tokens_than_inputs() -> None:
    """Rank 20 of 256: what fp32 cannot factorise is damped more, aloud, and the result is finite."""
    statistic = Hessian(256)
    statistic.update(torch.from_numpy(correlated(256, 20).T.copy()).float()[None])
    said: list[str] = []
    factor = inverse_factor(statistic.result(), 1e-12, said.append)
    assert said
    assert all("trying again with damping" in text for text in said)
    pruned, kept = sparsegpt(torch.from_numpy(weights(8, 256)).float(), factor, Sparsity(0.5))
    assert pruned.isfinite().all()
    assert int((~kept).sum()) == 8 * 128


def test_no_retry_where_none_is_needed() -> None:
    said: list[str] = []
    inverse_factor(torch.from_numpy(X @ X.T), 0.01, said.append)
    assert said == []


def test_a_matrix_that_no_damping_mends_is_refused() -> None:
    hopeless = torch.eye(4)
    hopeless[0, 1] = hopeless[1, 0] = 1e9
    with pytest.raises(UserError, match="cannot be inverted"):
        inverse_factor(hopeless)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_types_come_back_with_exact_zeros(dtype: torch.dtype) -> None:
    x = correlated(32, 80)
    weight = torch.from_numpy(weights(5, 32)).to(dtype)
    pruned, kept = sparsegpt(weight, inverse_factor(torch.from_numpy(x @ x.T).float()), Sparsity.parse("4:8"))
    assert pruned.dtype == dtype
    assert (pruned[~kept] == 0).all()
    assert not torch.signbit(pruned[~kept]).any()


def test_counts_are_exact_and_compat_takes_one_more_a_block() -> None:
    x, w = correlated(40, 90), torch.from_numpy(weights(7, 40))
    counts = {
        compat: (~sparsegpt(w, factor_of(x), Sparsity(0.5), block=16, compat=compat)[1]).int()
        for compat in (False, True)
    }
    for compat, more in ((False, 0), (True, 1)):
        blocks = [int(block.sum()) for block in counts[compat].split(16, dim=1)]
        assert blocks == [56 + more, 56 + more, 28 + more]


def test_of_equals_the_first_of_the_first_row_goes() -> None:
    factor = inverse_factor(torch.eye(6, dtype=torch.float64))
    _, kept = sparsegpt(torch.ones(3, 6), factor, Sparsity(0.5))
    assert kept.int().tolist() == [[0] * 6, [0] * 3 + [1] * 3, [1] * 6]
    _, kept = sparsegpt(torch.ones(2, 6), factor, Sparsity.parse("1:3"))
    assert kept.int().tolist() == [[0, 1, 1] * 2] * 2


def test_the_hessian_for_any_batches_and_strips() -> None:
    x = torch.randn(6, 10, 300, generator=torch.Generator().manual_seed(0))
    tokens = x.flatten(0, 1).double().numpy()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for sizes in ([6], [1] * 6, [1, 5]):
            statistic = Hessian(300)
            for batch in x.to(dtype).split(sizes):
                statistic.update(batch)
            total = statistic.result()
            assert total.dtype == dtype
            assert torch.equal(total, total.T)
            np.testing.assert_allclose(total.double().numpy(), tokens.T @ tokens, rtol=0, atol=60 * tolerance)


def test_the_method_scales_the_hessian_and_shares_one_factor() -> None:
    """The scale shows beside dead inputs only, whose ones count in the mean of the diagonal."""
    x = correlated(24, 60) / 10
    x[5] = 0
    hessian = 2 / 3 * x @ x.T
    hessian[5, 5] = 1
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(24)
    method = SparseGPT(Sparsity(0.5), block=24)
    prune = method.pruner(torch.from_numpy(x @ x.T), 3, lambda _: None)
    for seed in (1, 2):
        w = torch.from_numpy(weights(4, 24, seed))
        expected = oracle(np.where(np.arange(24) == 5, 0, w.numpy()), hessian, 0.5, 24)
        ((pruned, kept),) = prune([w])
        assert np.array_equal(~kept.numpy(), expected[1])
        np.testing.assert_allclose(pruned.numpy(), expected[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sparsity", ["0.5", "4:8", "2:4"])
def test_reconstruction_sparsegpt_wanda_magnitude(sparsity: str) -> None:
    for seed in range(3):
        x, w = correlated(64, 400, seed), weights(32, 64, seed)
        tensor = torch.from_numpy(w)
        ours, _ = sparsegpt(tensor, factor_of(x, 0.01), Sparsity.parse(sparsity))
        errors = [squared_error(w, ours.numpy(), x)]
        for squares in ((x**2).sum(axis=1), np.ones(64)):
            mask = wanda_mask(tensor, torch.from_numpy(squares), Sparsity.parse(sparsity)).numpy()
            errors.append(squared_error(w, np.where(mask, w, 0), x))
        assert all(better < worse for better, worse in itertools.pairwise(errors))


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_matrices_of_one_input_together_are_pruned_as_alone(sparsity: str) -> None:
    factor = factor_of(correlated(48, 100), 0.01)
    several = [torch.from_numpy(weights(outputs, 48, outputs)) for outputs in (6, 2, 2)]
    together = sparsegpt_all(several, factor, Sparsity.parse(sparsity), block=24)
    for weight, (pruned, kept) in zip(several, together, strict=True):
        alone, kept_alone = sparsegpt(weight, factor, Sparsity.parse(sparsity), block=24)
        assert torch.equal(kept, kept_alone)
        torch.testing.assert_close(pruned, alone, rtol=1e-12, atol=1e-12)


def test_hessian_of_bf16_activations_is_exact_but_for_the_order_of_summation() -> None:
    activations = torch.randn(3, 700, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    hessian = Hessian(300)
    for sequence in activations:
        hessian.update(sequence)
    tokens = activations.flatten(0, 1).double()
    exact, largest = tokens.T @ tokens, (tokens.abs().T @ tokens.abs())
    assert bool(((hessian.result().double() - exact).abs() < 1e-5 * largest).all())
