"""The Kullback-Leibler divergence by position is that of the full models' softmax."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_pvs.layerwise.divergence import Bucket, Reference, buckets, divergence
from nemo_pvs.layerwise.model import Compute
from tests.state_source import StateSource, random_ids, tiny_model

IDS = random_ids(5, 17, seed=1)


def _expected(reference: LlamaForCausalLM, model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        p, q = (one.double()(IDS.long()).logits.softmax(-1) for one in (reference, model))
    return (p * (p / q).log()).sum(-1)


def test_it_is_that_of_the_full_models() -> None:
    reference, model = tiny_model(0), tiny_model(1, num_hidden_layers=2, hidden_size=32)
    measured = divergence(StateSource(model), Reference(StateSource(reference)), IDS)
    torch.testing.assert_close(measured, _expected(reference, model), rtol=1e-4, atol=1e-5)
    assert (measured > 0).all()
    back = divergence(StateSource(reference.float()), Reference(StateSource(model.float())), IDS)
    assert not torch.allclose(measured, back, rtol=0.1), "it is not symmetric"


def test_a_model_does_not_diverge_from_itself() -> None:
    source = StateSource(tiny_model())
    assert divergence(source, Reference(source), IDS).abs().max() == 0


def test_from_a_uniform_distribution_it_is_the_missing_entropy() -> None:
    """KL(p || uniform) = ln V - H(p)."""
    reference, uniform = tiny_model(), tiny_model()
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    measured = divergence(StateSource(uniform), Reference(StateSource(reference)), IDS)
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=reference(IDS.long()).logits).entropy()
    torch.testing.assert_close(measured, math.log(128) - entropy.double(), rtol=1e-4, atol=1e-5)


def test_sweeps_do_not_matter_and_progress_reaches_its_end() -> None:
    source, other = StateSource(tiny_model(0)), StateSource(tiny_model(1))
    steps: list[tuple[int, int]] = []
    swept = divergence(
        other,
        Reference(source),
        IDS,
        Compute(memory_limit=2 * 2 * 17 * 64 * 4),  # two windows of states of both models
        progress=lambda *step: steps.append(step),
    )
    torch.testing.assert_close(swept, divergence(other, Reference(source), IDS), rtol=1e-5, atol=1e-6)
    assert steps == [(done, 3 * 8) for done in range(1, 25)]


def test_the_reference_runs_once_for_several_models() -> None:
    source = StateSource(tiny_model(0))
    reference = Reference(source)
    first = divergence(StateSource(tiny_model(1)), reference, IDS)
    source.reads.clear()
    steps: list[tuple[int, int]] = []
    divergence(StateSource(tiny_model(2)), reference, IDS, progress=lambda *step: steps.append(step))
    assert source.reads == []
    assert steps[-1] == (8, 8)
    assert torch.equal(divergence(StateSource(tiny_model(1)), reference, IDS), first)
    divergence(StateSource(tiny_model(1)), reference, IDS.flip(0))
    assert source.reads


@pytest.mark.parametrize(
    ("length", "ends"), [(1, [1]), (16, [16]), (17, [16, 17]), (300, [16, 64, 256, 300]), (1024, [16, 64, 256, 1024])]
)
def test_buckets_cover_every_position_once(length: int, ends: list[int]) -> None:
    found = buckets(length)
    assert [bucket.last for bucket in found] == ends
    assert found[0].first == 1
    assert all(later == Bucket(earlier.last + 1, later.last) for earlier, later in pairwise(found))
