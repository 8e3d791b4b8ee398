"""Hard concrete gates against their closed forms (golden vectors computed in numpy) and against draws."""

import math

import pytest
import torch

from nemo_pvs.pruning.learned.hard_concrete import LOG_ALPHA_RANGE, deterministic, lagrangian, sample, zero_probability


def _sample(uniform: float, log_alpha: float) -> float:
    return float(sample(torch.tensor(log_alpha).double(), torch.tensor(uniform).double()))


def test_samples_are_those_of_the_formula() -> None:
    assert _sample(0.5, 0.0) == pytest.approx(0.5, abs=1e-12)
    assert _sample(0.2, 0.0) == pytest.approx(0.03333333, abs=1e-8)
    assert _sample(0.3, 1.0) == pytest.approx(0.56841710, abs=3e-8)
    assert _sample(0.1, 0.0) == 0
    assert _sample(0.999, 4.0) == 1


def test_probability_of_zero_is_the_closed_form() -> None:
    found = zero_probability(torch.tensor([0.0, 5.0, math.log(100), math.log(0.01)], dtype=torch.float64))
    torch.testing.assert_close(
        found, torch.tensor([0.16817782, 0.00136042, 0.00201772, 0.95287021]).double(), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 1.0, 3.0])
def test_probability_of_zero_is_what_draws_show(log_alpha: float) -> None:
    uniform = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros = (sample(torch.tensor(log_alpha).double(), uniform.clamp(1e-6, 1 - 1e-6)) == 0).double().mean()
    assert float(zeros) == pytest.approx(float(zero_probability(torch.tensor(log_alpha).double())), abs=2e-3)


def test_a_sample_is_zero_exactly_below_the_probability() -> None:
    assert _sample(0.16817, 0.0) == 0
    assert _sample(0.16818, 0.0) > 0


def test_deterministic_gates_keep_the_largest_of_each_row() -> None:
    log_alpha = torch.tensor([[3.0, -1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [-4.0, -2.0, -3.0, -1.0]])
    gates = deterministic(log_alpha, 2)
    assert (gates != 0).tolist() == [
        [True, False, True, False],
        [True, True, False, False],
        [False, True, False, True],
    ]
    assert float(deterministic(torch.tensor([LOG_ALPHA_RANGE[1]]), 1)) == pytest.approx(0.99603471, abs=1e-7)
    assert float(deterministic(torch.tensor([0.0]), 1)) == 0.5


@pytest.mark.parametrize("kept", [1, 5, 17])
def test_the_number_of_zeros_is_exact_in_every_row(kept: int) -> None:
    log_alpha = torch.randn(6, 17, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    assert ((deterministic(log_alpha, kept) == 0).sum(dim=1) == 17 - kept).all()


def test_gradients_of_the_multipliers_are_the_excess_and_its_square() -> None:
    sparsity = torch.tensor([0.1, 0.4, 0.3], dtype=torch.float64)
    multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    lagrangian(sparsity, 0.5, multipliers).backward()
    excess = sparsity - 0.5
    torch.testing.assert_close(multipliers.grad, torch.stack([excess.mean(), (excess**2).mean()]))
