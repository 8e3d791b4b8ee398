"""Second-order compensation against least squares in float64 (T-E3 of methods.md: as T-S1)."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.learned.compensation import predictors


def compensated(weight: torch.Tensor, hessian: torch.Tensor, gone: list[int], damping: float = 0.0) -> torch.Tensor:
    kept = torch.ones(weight.shape[1], dtype=torch.bool)
    kept[gone] = False
    result = weight + weight[:, gone] @ predictors(hessian, torch.tensor(gone), kept, damping).T
    result[:, gone] = 0
    return result


@pytest.mark.parametrize(("gone", "expected"), [([0], [0, -0.6, 1.9]), ([1], [0, 0, 1.5]), ([0, 2], [0, 2 / 3, 0])])
@pytest.mark.parametrize("scale", [1, 2 / 3])
def test_golden_vectors(gone, expected, scale) -> None:
    """methods.md 18.1 for column 0; for the others its H^-1, where no column comes before another."""
    inputs = torch.tensor([[1, 2, 0, 1], [0, 1, 1, 2], [1, 0, 2, 1]]).double()
    weight = torch.tensor([[0.5, -1, 2]]).double()
    result = compensated(weight, scale * inputs @ inputs.T, gone)
    assert result.flatten().tolist() == pytest.approx(expected)
    if gone == [0]:
        assert float(((weight - result) @ inputs).square().sum()) == pytest.approx(0.8)


def test_several_columns_at_once_reach_the_joint_least_squares_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 40, generator=generator).double()
    inputs[3] += 2 * inputs[5]
    weight = torch.randn(6, 8, generator=generator).double()
    stay = [0, 2, 4, 5, 6]
    best = torch.linalg.lstsq(inputs[stay].T, (weight @ inputs).T).solution.T
    result = compensated(weight, inputs @ inputs.T, [1, 3, 7])
    assert torch.allclose(result[:, stay], best, atol=1e-10)
    alone = weight.clone()
    alone[:, [1, 3, 7]] = 0
    errors = [float(((weight - one) @ inputs).square().sum()) for one in (result, alone)]
    assert errors[0] < 0.8 * errors[1]


def test_one_column_is_the_step_of_optimal_brain_surgeon() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(5, 30, generator=generator).double()
    hessian, weight = inputs @ inputs.T, torch.randn(3, 5, generator=generator).double()
    inverse = torch.linalg.inv(hessian)
    step = weight - weight[:, [2]] / inverse[2, 2] * inverse[2]
    assert torch.allclose(compensated(weight, hessian, [2]), step, atol=1e-10)


def test_what_was_removed_before_and_dead_inputs_take_nothing_over() -> None:
    inputs = torch.randn(4, 9, generator=torch.Generator().manual_seed(2)).double()
    inputs[3] = 0
    kept = torch.tensor([True, False, False, True])
    result = predictors(inputs @ inputs.T, torch.tensor([2]), kept, 0.0)
    assert result[1:].flatten().tolist() == [0, 0, 0]
    assert float(result[0]) == pytest.approx(float(inputs[0] @ inputs[2] / inputs[0].square().sum()))


def test_fewer_tokens_than_inputs_are_damped_and_what_is_not_finite_is_refused() -> None:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(3)).double()
    kept = torch.ones(8, dtype=torch.bool)
    kept[0] = False
    assert predictors(inputs @ inputs.T, torch.tensor([0]), kept, 0.0).isfinite().all()
    with pytest.raises(UserError, match="not finite"):
        predictors(torch.full((8, 8), torch.inf), torch.tensor([0]), kept)
