"""Wanda: golden vectors, a NumPy oracle, and a statistic that does not care for batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.sparse.wanda import Wanda, wanda_mask

WEIGHT = torch.tensor([[0.1, -0.4, 0.3, 0.2, 0.5, -0.05, 0.25, -0.6], [-0.2, 0.1, 0.6, -0.3, 0.05, 0.4, -0.1, 0.2]])
SQUARES = torch.tensor([4, 1, 1, 9, 0.25, 16, 4, 1])


@pytest.mark.parametrize(
    ("sparsity", "pruned"),
    [
        ("2:4", [[1, 0, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0]]),
        ("0.5", [[1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0, 1, 1]]),
    ],
)
def test_golden(sparsity: str, pruned: list[list[int]]) -> None:
    assert (~wanda_mask(WEIGHT, SQUARES, Sparsity.parse(sparsity))).int().tolist() == pruned


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.77])
def test_every_row_loses_exactly_its_share(ratio: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 90, generator=generator).mul(8).round() / 8
    squares = torch.randint(0, 4, (90,), generator=generator).float()
    mask = wanda_mask(weight, squares, Sparsity(ratio))
    assert (~mask).sum(dim=1).tolist() == [int(90 * ratio + 1e-9)] * 40
    scores = weight.numpy().astype(np.float64) ** 2 * squares.numpy()
    for row, kept in zip(scores, mask.numpy(), strict=True):
        gone = np.lexsort((np.arange(90), row))[: int(90 * ratio + 1e-9)]
        assert sorted(gone) == np.flatnonzero(~kept).tolist()


def test_the_statistic_is_the_published_running_mean_for_any_batches() -> None:
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))
    mean = np.zeros(7)
    for seen, sequence in enumerate(x.numpy().astype(np.float64)):
        mean = mean * seen / (seen + 1) + (sequence**2).sum(axis=0) / (seen + 1)
    for sizes in ([6], [1] * 6, [4, 2]):
        statistic = Wanda(Sparsity(0.5)).statistic(7)
        for batch in x.split(sizes):
            statistic.update(batch)
        np.testing.assert_allclose(statistic.result().numpy() / 6, mean, rtol=1e-6)


def test_scaling_all_inputs_changes_nothing_and_kept_weights_stay() -> None:
    prune = Wanda(Sparsity(0.5)).pruner(SQUARES.double() * 12, 3, lambda _: None)
    ((pruned, kept),) = prune([WEIGHT.bfloat16()])
    assert torch.equal(kept, wanda_mask(WEIGHT.bfloat16(), SQUARES, Sparsity(0.5)))
    assert torch.equal(pruned, torch.where(kept, WEIGHT.bfloat16(), 0))
    assert pruned.dtype == torch.bfloat16
    assert not torch.signbit(pruned[~kept]).any()


def test_inputs_that_are_never_there_lose_their_weights_first() -> None:
    squares = SQUARES.clone()
    squares[[2, 6]] = 0
    mask = wanda_mask(WEIGHT, squares, Sparsity(0.25))
    assert (~mask).nonzero()[:, 1].tolist() == [2, 6, 2, 6]
