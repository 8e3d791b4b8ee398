"""Saliency of minimal groups: exact on quadratics, fair between kinds; and what goes next, until nothing may."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.learned.removal_rules import RemovalRules, fewest_removals, smallest, unit_parameters
from nemo_pvs.pruning.learned.saliency import Removal, add_terms, next_removal, saliency
from nemo_pvs.pruning.learned.unit_space import UnitSpace

SHAPE = Shape(layers=3, hidden=12, ffn=10, heads=8, kv_groups=4, head_dim=4, vocab=32, tied=False)
SPACE = UnitSpace(SHAPE)


def test_saliency_is_the_change_of_a_quadratic_loss_with_a_diagonal_hessian() -> None:
    """T-E1 of methods.md: by brute force, every row and every column of a matrix in turn."""
    generator = torch.Generator().manual_seed(0)
    weight, best = (torch.randn(4, 5, generator=generator).double() for _ in range(2))
    curvature = torch.rand(4, 5, generator=generator).double()

    def loss(matrix: torch.Tensor) -> float:
        return float((curvature * (matrix - best).square()).sum() / 2)

    gradient = curvature * (weight - best)
    first, second = weight * gradient, curvature * weight.square()
    for axis, size in ((0, 4), (1, 5)):
        scores = saliency(first.sum(1 - axis), second.sum(1 - axis), signed=True)
        for index in range(size):
            without = weight.clone()
            without.select(axis, index).zero_()
            change = loss(without) - loss(weight)
            assert float(scores[index]) == pytest.approx(change, abs=1e-12)
            unsigned = saliency(first.sum(1 - axis), second.sum(1 - axis))[index]
            assert float(unsigned) == pytest.approx(abs(change), abs=1e-12)
    assert (saliency(first.sum(1), second.sum(1), signed=True) < 0).any(), "the absolute value changes nothing here"


def test_terms_are_added_to_the_units_of_rows_and_of_columns() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, gradient = (torch.randn(4, 3, generator=generator) for _ in range(2))
    totals = torch.zeros(2, 6, dtype=torch.float64)
    add_terms(totals, weight * gradient, torch.tensor([0, 0, 1, 5]), torch.tensor([2, 3, 2]))
    product = (weight * gradient).double()
    for total, terms in zip(totals, (product, product.square()), strict=True):
        assert float(total[0]) == pytest.approx(float(terms[:2].sum()), rel=1e-6)
        assert float(total[1]) == pytest.approx(float(terms[2].sum()), rel=1e-6)
        assert float(total[2]) == pytest.approx(float(terms[:, [0, 2]].sum()), rel=1e-6)
        assert float(total[3]) == pytest.approx(float(terms[:, 1].sum()), rel=1e-6)
        assert float(total[4]) == 0


def test_the_squared_mean_gradient_times_the_tokens_estimates_the_curvature() -> None:
    """For y = w x + noise of variance 1 the Hessian of the mean loss is E x^2, here 4."""
    generator = torch.Generator().manual_seed(2)
    tokens = 64
    inputs = 2 * torch.randn(20_000, tokens, generator=generator)
    gradients = (inputs * torch.randn(20_000, tokens, generator=generator)).mean(1)
    assert float(tokens * gradients.square().mean()) == pytest.approx(4.0, rel=0.03)


def chosen(scores: torch.Tensor, kept: torch.Tensor | None = None, **rules: object) -> Removal:
    return next_removal(scores, SPACE.everything() if kept is None else kept, SPACE, RemovalRules(1, **rules))


def test_of_all_kinds_the_least_saliency_per_parameter_goes() -> None:
    costs = unit_parameters(SHAPE, SHAPE)
    assert costs == {"hidden": 3 * (2 * 12 * 4 + 3 * 10 + 2) + 2 * 32 + 1, "groups": 6 * 4 * 12, "ffn": 3 * 12}
    scores = torch.empty(SPACE.size).double()
    for kind, units in (("hidden", SPACE.hidden), ("groups", SPACE.groups), ("ffn", SPACE.ffn)):
        units(scores).fill_(costs[kind])
    scores[-1] = 0
    assert chosen(scores, uniform=False).kind == "hidden", "a tie"
    SPACE.groups(scores)[1, 2] -= 2
    found = chosen(scores, uniform=False)
    assert (found.kind, found.units.tolist()) == ("groups", [12 + 4 + 2])
    assert found.saliency == pytest.approx(1 - 2 / costs["groups"])
    SPACE.ffn(scores)[2, 7] -= 1
    found = chosen(scores, uniform=False)
    assert (found.kind, found.units.tolist()) == ("ffn", [12 + 12 + 27])
    assert chosen(scores, uniform=False, per_parameter=False).kind == "ffn", "a channel is the smallest"
    SPACE.groups(scores)[1, 2] = 30
    found = chosen(scores, uniform=False, per_parameter=False)
    assert (found.kind, found.saliency) == ("groups", 30)
    SPACE.groups(scores)[1, 2] = costs["groups"]
    uniform = chosen(scores)
    assert (uniform.kind, uniform.units.tolist()) == ("ffn", [24, 34, 51])
    assert uniform.parameters == 3 * costs["ffn"]


def test_several_at_once_are_the_lowest_of_one_layer() -> None:
    scores = torch.arange(SPACE.size, 0, -1).double() * 1000
    SPACE.ffn(scores)[1, [2, 3, 5]] = 1.0
    SPACE.ffn(scores)[0, 0] = 0.0
    found = chosen(scores, uniform=False, ffn_at_once=3)
    assert found.units.tolist() == [24 + 12, 24 + 13, 24 + 15]


def test_a_layer_keeps_what_it_must_and_then_nothing_goes() -> None:
    scores, kept = torch.ones(SPACE.size).double(), SPACE.everything()
    SPACE.hidden(scores).fill_(1e9)
    SPACE.groups(scores).fill_(-1.0)
    rules = RemovalRules(1, uniform=False, least_groups=2, ffn_at_once=4, hidden_at_once=5)
    while (left := SPACE.kept_shape(kept)) != smallest(SHAPE, rules):
        removal = next_removal(scores, kept, SPACE, rules)
        kept[removal.units] = False
        assert left.parameters - SPACE.kept_shape(kept).parameters == removal.parameters
    with pytest.raises(UserError, match="pruning a layer to nothing"):
        next_removal(scores, kept, SPACE, rules)
    assert left == SHAPE.replace(hidden=2, kv_groups=2, ffn=2)


def test_planted_useless_units_are_the_ones_removed() -> None:
    """A linear problem: a two-layer net whose teacher reads three of eight inputs; trained weights of others are 0."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, 8, generator=generator).double()
    truth = torch.zeros(8).double()
    truth[[1, 4, 6]] = torch.tensor([1.0, -2.0, 0.5]).double()
    weight = (truth + 0.02 * torch.randn(8, generator=generator)).requires_grad_()
    totals = torch.zeros(2, 9, dtype=torch.float64)
    for _ in range(50):
        batch = inputs[torch.randint(256, (32,), generator=generator)]
        noise = 0.1 * torch.randn(32, generator=generator)
        (gradient,) = torch.autograd.grad((batch @ (weight - truth) - noise).square().mean(), weight)
        product = (weight * gradient).detach()[:, None]
        add_terms(totals, product, torch.arange(8), torch.tensor([8]))
    scores = saliency(totals[0] / 50, 32 * totals[1] / 50)[:8]
    assert set(scores.topk(3).indices.tolist()) == {1, 4, 6}


@pytest.mark.parametrize("uniform", [True, False])
def test_the_fewest_removals_are_a_bound_that_can_be_reached(uniform: bool) -> None:
    target = SHAPE.parameters - 2 * unit_parameters(SHAPE, SHAPE)["hidden"]
    rules = RemovalRules(target, uniform=uniform)
    assert fewest_removals(SHAPE, rules) == 2
    for wrong in (SHAPE.parameters, 10):
        with pytest.raises(UserError, match="cannot be pruned to"):
            fewest_removals(SHAPE, RemovalRules(wrong, uniform=uniform))
