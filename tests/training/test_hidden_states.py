"""The loss of hidden states: its value, both gradients and the map's step are those of autograd in float64."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.training.hidden_states import HiddenStates

WEIGHT = 0.7
PAIRS = [(0, 0), (3, 5)]


def _tensors(width: int, seed: int) -> list[torch.Tensor]:
    """Return states [tokens, samples, width] of two pairs in two micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 2, width, generator=generator, dtype=torch.float64) for _ in range(4)]


def _loss(own: list[torch.Tensor], its: list[torch.Tensor], widen: torch.Tensor | None) -> torch.Tensor:
    """The definition: a mean over channels, tokens, samples, pairs and micro-batches."""
    mapped = own if widen is None else [one @ widen.T for one in own]
    return torch.stack([(one - other).square().mean() for one, other in zip(mapped, its, strict=True)]).mean()


def _step(states: HiddenStates, own: list[torch.Tensor], its: list[torch.Tensor]) -> torch.Tensor:
    """Run the micro-batches of a step; the student's own loss is the sum of its states, each times its number."""
    states.begin(2)
    drawn = [states.drawn(one, other) for one, other in zip(own, its, strict=True)]
    torch.stack([number * one.sum() for number, one in enumerate(drawn)]).sum().backward()
    return states.loss()


@pytest.mark.parametrize("width", [3, 5], ids=["as wide", "wider"])
def test_steps_are_those_of_autograd(width: int) -> None:
    states = HiddenStates(PAIRS, weight=WEIGHT, widths=(3, width), device=torch.device("cpu"))
    widen = torch.zeros(width, 3, dtype=torch.float64, requires_grad=True) if width > 3 else None
    optimizer = torch.optim.AdamW([widen], betas=(0.9, 0.95), weight_decay=0.0) if widen is not None else None
    for step in range(3):
        own, its = _tensors(3, step), _tensors(width, 100 + step)
        mine, reference = ([one.clone().requires_grad_() for one in own] for _ in range(2))
        loss = _step(states, mine, its)
        expected = _loss(reference, its, widen)
        (WEIGHT * expected).backward()
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)
        for number, (one, other) in enumerate(zip(mine, reference, strict=True)):
            assert other.grad is not None
            torch.testing.assert_close(one.grad, other.grad + number, rtol=1e-5, atol=1e-7)
        if optimizer and widen is not None and states.map is not None:
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            optimizer.step()
            optimizer.zero_grad()
            states.learn(0.01 * (step + 1))
            torch.testing.assert_close(states.map.detach().double(), widen.detach(), rtol=1e-4, atol=1e-6)
            assert states.map.any()


def test_it_goes_on_where_it_was() -> None:
    def new() -> HiddenStates:
        return HiddenStates(PAIRS, weight=WEIGHT, widths=(3, 5), device=torch.device("cpu"))

    straight, interrupted = new(), new()
    for step in range(4):
        if step == 2:
            state = interrupted.state_dict()
            interrupted = new()
            interrupted.load_state_dict(state)
        for states in (straight, interrupted):
            _step(states, [one.requires_grad_() for one in _tensors(3, step)], _tensors(5, 100 + step))
            states.learn(0.01)
    assert straight.map is not None
    assert interrupted.map is not None
    assert straight.map.equal(interrupted.map)


def test_ranks_that_share_the_tokens_have_their_parts_of_it() -> None:
    """Sequence parallelism by hand: sums over the shards are what one rank has."""
    whole = HiddenStates(PAIRS, weight=WEIGHT, widths=(3, 5), device=torch.device("cpu"))
    parts = [HiddenStates(PAIRS, weight=WEIGHT, widths=(3, 5), device=torch.device("cpu"), shards=2) for _ in range(2)]
    own, its = _tensors(3, 0), _tensors(5, 1)
    loss = _step(whole, [one.requires_grad_() for one in own], its)
    losses = []
    for shard, states in enumerate(parts):
        mine, theirs = ([one.detach().chunk(2)[shard] for one in some] for some in (own, its))
        losses.append(_step(states, [one.requires_grad_() for one in mine], theirs))
    assert float(sum(losses)) == pytest.approx(float(loss), rel=1e-6)
    assert whole.map is not None
    assert whole.map.grad is not None
    together = sum(states.map.grad for states in parts)  # type: ignore[union-attr, misc]
    torch.testing.assert_close(together, whole.map.grad)
