"""The loss of hidden states against its definition, written out for single tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_pvs.megatron.distillation.losses import hidden_loss, initial_projection


def _states(width: int, seed: int) -> torch.Tensor:
    return torch.randn(5, 2, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_is_its_definition(kind: str, projected: bool) -> None:
    student, teacher = 100 * _states(6, 0), _states(9 if projected else 6, 1)
    projection = initial_projection(6, 9, seed=3).double() if projected else None
    found = hidden_loss(student, teacher, projection, kind=kind)
    assert found.shape == (5, 2)
    for position in range(5):
        for sequence in range(2):
            s, t = student[position, sequence].tolist(), teacher[position, sequence].tolist()
            s, t = ([value / math.sqrt(sum(v * v for v in one) / len(one)) for value in one] for one in (s, t))
            if projection is not None:
                s = [sum(s[i] * float(projection[i, j]) for i in range(6)) for j in range(9)]
            if kind == "mse":
                expected = sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(t)
            else:
                norms = math.sqrt(sum(a * a for a in s) * sum(b * b for b in t))
                expected = 1 - sum(a * b for a, b in zip(s, t, strict=True)) / norms
            assert float(found[position, sequence]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_size_of_the_residual_stream_does_not_count(kind: str) -> None:
    """A student that lost layers adds less to its stream; only where it points to is compared."""
    states = _states(6, 0)
    assert hidden_loss(0.01 * states, 7 * states, kind=kind).abs().max() < 0.01
    assert hidden_loss(-states, states, kind=kind).min() > 1.9


def test_bf16_is_compared_in_full_precision_and_other_kinds_are_unknown() -> None:
    states = _states(6, 0).bfloat16()
    assert hidden_loss(states, states).dtype == torch.float32
    with pytest.raises(ValueError, match="no hidden loss 'l1'"):
        hidden_loss(states, states, kind="l1")


def test_a_projection_begins_the_same_everywhere_and_keeps_sizes() -> None:
    first = initial_projection(64, 96, seed=1)
    assert torch.equal(first, initial_projection(64, 96, seed=1))
    assert not torch.equal(first, initial_projection(64, 96, seed=2))
    states = _states(64, 0).float()
    assert ((states @ first).norm() / states.norm()).item() == pytest.approx(math.sqrt(96 / 64), rel=0.1)
