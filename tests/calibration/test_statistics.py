"""The statistics against hand-computed values, float64 loops, and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_pvs.calibration.statistics import ChannelStatistic, CosineDistance, Energy, MeanAbsL2, Moments

BOTH = pytest.mark.parametrize("statistic", [Energy, MeanAbsL2])


def batch(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def measure(statistic: type[ChannelStatistic], *batches: torch.Tensor) -> torch.Tensor:
    measured = statistic(batches[0].shape[-1])
    for activations in batches:
        measured.update(activations)
    return measured.result()


def test_two_sequences_of_two_tokens_by_hand() -> None:
    activations = torch.tensor([[[1.0, 3.0], [3.0, 3.0]], [[0.0, 2.0], [0.0, 4.0]]])
    assert measure(Energy, activations).tolist() == [10.0, 38.0]
    # sqrt(2^2 + 0^2) and sqrt(3^2 + 3^2)
    torch.testing.assert_close(measure(MeanAbsL2, activations), torch.tensor([2.0, 18.0**0.5]).double())


def test_signs_do_not_cancel() -> None:
    activations = torch.tensor([[[-2.0], [2.0]]])
    assert measure(Energy, activations).tolist() == [8.0]
    assert measure(MeanAbsL2, activations).tolist() == [2.0]


def test_float64_loop_over_tokens() -> None:
    activations = batch(3, 7, 5)
    energy = [0.0] * 5
    norm = [0.0] * 5
    for sequence in activations.double().tolist():
        for channel in range(5):
            energy[channel] += sum(token[channel] ** 2 for token in sequence)
            norm[channel] += (sum(abs(token[channel]) for token in sequence) / 7) ** 2
    torch.testing.assert_close(measure(Energy, activations), torch.tensor(energy).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(measure(MeanAbsL2, activations), torch.tensor(norm).double().sqrt(), rtol=1e-6, atol=0)


@BOTH
def test_batching_does_not_matter(statistic: type[ChannelStatistic]) -> None:
    activations = batch(6, 9, 4)
    whole = measure(statistic, activations)
    for size in (1, 4):
        torch.testing.assert_close(measure(statistic, *activations.split(size)), whole, rtol=1e-6, atol=0)


@BOTH
def test_merging_two_processes_is_one_process(statistic: type[ChannelStatistic]) -> None:
    first, second = batch(2, 9, 4), batch(3, 9, 4, seed=1)
    one, other = statistic(4), statistic(4)
    one.update(first)
    other.update(second)
    one.merge(other)
    assert torch.equal(one.result(), measure(statistic, first, second))


def test_cutting_sequences_leaves_energy_alone_but_not_the_norm_of_means() -> None:
    activations = batch(2, 8, 4)
    halves = activations.reshape(4, 4, 4)
    torch.testing.assert_close(measure(Energy, halves), measure(Energy, activations), rtol=1e-6, atol=0)
    assert ((measure(MeanAbsL2, halves) / measure(MeanAbsL2, activations) - 1).abs() > 0.1).all()


@BOTH
def test_bfloat16_activations_are_not_summed_in_bfloat16(statistic: type[ChannelStatistic]) -> None:
    """999 is no bf16 number; a sum that runs in bf16 even stops at 256."""
    ones = torch.ones(999, 1, 2, dtype=torch.bfloat16)
    expected = 999.0 if statistic is Energy else 999.0**0.5
    assert measure(statistic, ones).tolist() == pytest.approx([expected] * 2, rel=1e-12)


@BOTH
def test_many_small_batches_do_not_vanish_beside_a_large_one(statistic: type[ChannelStatistic]) -> None:
    """2^24 + 1 is 2^24 in fp32; across batches sums are fp64."""
    large, one = torch.full((1, 1, 1), 2.0**12), torch.ones(1, 1, 1)
    value = measure(statistic, large, *([one] * 10)).item()
    assert value == pytest.approx(2.0**24 + 10 if statistic is Energy else (2.0**24 + 10) ** 0.5, rel=1e-12)


def test_result_is_a_snapshot() -> None:
    energy = Energy(1)
    energy.update(torch.ones(1, 1, 1))
    before = energy.result()
    energy.update(torch.ones(1, 1, 1))
    assert before.tolist() == [1.0]


def test_cosine_distance_is_the_mean_over_tokens() -> None:
    inputs, outputs = batch(3, 5, 16), batch(3, 5, 16, seed=1)
    cosine = torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
    distance = CosineDistance()
    for some_inputs, some_outputs in zip(inputs.split(2), outputs.split(2), strict=True):
        distance.update(some_inputs, some_outputs)
    assert distance.result() == pytest.approx(float((1 - cosine).mean()), rel=1e-6)


def test_cosine_distance_of_equal_opposite_and_orthogonal_states() -> None:
    states = batch(2, 3, 8)
    for outputs, expected in ((states, 0.0), (-3 * states, 2.0)):
        distance = CosineDistance()
        distance.update(states, outputs)
        assert distance.result() == pytest.approx(expected, abs=1e-7)
    distance = CosineDistance()
    distance.update(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]]))
    assert distance.result() == 1.0


def test_small_distances_are_told_apart_where_bfloat16_cannot() -> None:
    states = batch(4, 64, 256)
    results = []
    for noise in (0.01, 0.02):
        distance = CosineDistance()
        distance.update(states, states + noise * batch(4, 64, 256, seed=1))
        results.append(distance.result())
    # 1 - cos is noise^2 / 2 to first order, far below bf16's step of 2^-8.
    assert results == pytest.approx([0.01**2 / 2, 0.02**2 / 2], rel=0.02)


def test_merged_cosine_distances_weigh_tokens_equally() -> None:
    inputs, outputs = batch(4, 5, 8), batch(4, 5, 8, seed=1)
    one, other, whole = CosineDistance(), CosineDistance(), CosineDistance()
    one.update(inputs[:1], outputs[:1])
    other.update(inputs[1:], outputs[1:])
    one.merge(other)
    whole.update(inputs, outputs)
    assert one.result() == pytest.approx(whole.result(), rel=1e-12)


def moments(*batches: torch.Tensor) -> Moments:
    measured = Moments(batches[0].shape[-1])
    for activations in batches:
        measured.update(activations)
    return measured


def assert_same_moments(one: Moments, other: Moments, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(one.mean(), other.mean(), rtol=rtol, atol=1e-12)
    torch.testing.assert_close(one.variance(), other.variance(), rtol=rtol, atol=0)


def test_moments_of_three_sequences_by_hand() -> None:
    """One channel, three sequences of two tokens: running means 2, 3, 3."""
    sequences = torch.tensor([[1.0, 3.0], [2.0, 6.0], [5.0, 1.0]])[:, :, None]
    results = [moments(sequences[:count]) for count in (1, 2, 3)]
    assert [measured.mean().item() for measured in results] == [2.0, 3.0, 3.0]
    assert [measured.fluctuation().item() for measured in results] == pytest.approx([0, 5, 5 + 1 / 6], rel=1e-12)
    assert results[-1].variance().item() == pytest.approx(4.4, rel=1e-12)


def test_moments_are_those_of_numpy_over_all_tokens() -> None:
    activations = 3 * batch(7, 11, 5) + batch(1, 1, 5, seed=1)
    tokens = activations.double().flatten(0, 1).numpy()
    measured = moments(*activations.split(3))
    np.testing.assert_allclose(measured.mean().numpy(), tokens.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(measured.variance().numpy(), tokens.var(axis=0, ddof=1), rtol=1e-6)


def test_fluctuation_is_the_published_recurrence_and_its_closed_form() -> None:
    activations = (batch(9, 13, 4) + 0.5 * batch(9, 1, 4, seed=1)).double()
    recurrence = torch.zeros(4).double()
    closed = torch.zeros(4).double()
    for n in range(1, 10):
        mean = activations[:n].mean(dim=(0, 1))
        distance = ((activations[n - 1] - mean) ** 2).sum(dim=0)
        if n > 1:
            recurrence = recurrence * (n - 2) / (n - 1) + distance / n
            closed += (n - 1) / n * distance
    torch.testing.assert_close(recurrence, closed / 8, rtol=1e-10, atol=0)
    # Ours sees fp32 activations: exact to their rounding, whatever the batches.
    for size in (1, 4, 9):
        measured = moments(*activations.float().split(size)).fluctuation()
        torch.testing.assert_close(measured, recurrence, rtol=1e-5, atol=0)


def test_fluctuation_follows_the_order_and_the_variance_does_not() -> None:
    activations = batch(6, 5, 3) * torch.arange(1, 7)[:, None, None]
    forward, backward = moments(activations), moments(activations.flip(0))
    assert_same_moments(forward, backward)
    assert ((forward.fluctuation() / backward.fluctuation() - 1).abs() > 0.05).all()


def test_merging_moments_is_associative_and_loses_the_order() -> None:
    parts = [batch(count, 6, 4, seed=count) + count for count in (1, 2, 5)]
    left, middle, right = (moments(part) for part in parts)
    left.merge(middle)
    left.merge(right)
    other, tail = moments(parts[0]), moments(parts[1])
    tail.merge(moments(parts[2]))
    other.merge(tail)
    assert_same_moments(left, other)
    assert_same_moments(left, moments(*parts))
    assert left.fluctuation() is None


def test_a_large_mean_does_not_swallow_a_small_variance() -> None:
    """E[x^2] - E[x]^2 in fp32 would be off by more than the variance itself."""
    noise = batch(8, 64, 3)
    measured = moments(*(1000 + noise).split(2))
    exact = (1000 + noise).double().flatten(0, 1).var(dim=0)
    torch.testing.assert_close(measured.variance(), exact, rtol=1e-5, atol=0)


def test_constant_channels_have_no_variance() -> None:
    measured = moments(torch.full((3, 4, 2), 0.5))
    assert measured.variance().tolist() == measured.fluctuation().tolist() == [0.0, 0.0]


def test_bfloat16_moments_are_not_summed_in_bfloat16() -> None:
    activations = (batch(4, 300, 2) + 3).bfloat16()
    assert_same_moments(moments(activations), moments(activations.float()), rtol=0)
