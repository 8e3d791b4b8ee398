"""Products by oneDNN are those of PyTorch, and whatever runs models in fp32 on the CPU uses them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nemo_pvs.evaluation.scoring import TransformersScorer
from nemo_pvs.layerwise.linear import linear
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.layerwise.token_scores import tokens_at_once
from tests.layerwise.test_perplexity import token_set
from tests.multiplications import ATEN, ONEDNN, multiplied
from tests.state_source import StateSource, random_ids, tiny_model


def used(work: Callable[[], object]) -> dict[str, bool]:
    """Return which libraries multiplied matrices with weights."""
    counts = multiplied(work)
    return {"oneDNN": ONEDNN in counts, "MKL": any(kind in counts for kind in ATEN)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(0,), (1,), (70,), (3, 50)])
def test_the_product_is_exact_up_to_rounding(size: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(len(size))
    inputs, weight = torch.randn(*size, 33, generator=generator), torch.randn(20, 33, generator=generator)
    added = torch.randn(20, generator=generator) if bias else None
    expected = inputs.double() @ weight.double().T + (0 if added is None else added.double())
    with torch.no_grad():
        assert used(lambda: linear(inputs, weight, added)) == {"oneDNN": True, "MKL": False}
        torch.testing.assert_close(linear(inputs, weight, added).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_left_to_pytorch() -> None:
    inputs, weight = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True)
    linear(inputs, weight).sum().backward()
    torch.testing.assert_close(weight.grad, inputs.sum(0).expand(4, 16))
    assert used(lambda: linear(inputs, weight)) == {"oneDNN": False, "MKL": True}


def test_models_multiply_with_onednn() -> None:
    source = StateSource(tiny_model())
    scorer = TransformersScorer(source, dtype=torch.float32, device="cpu")
    assert used(lambda: perplexity(source, token_set())) == {"oneDNN": True, "MKL": False}
    assert used(lambda: scorer.score(random_ids(3, 40).long())) == {"oneDNN": True, "MKL": False}


def test_logits_of_few_tokens_at_once_on_the_cpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert tokens_at_once(49152, cpu) == 128
    assert tokens_at_once(49152, gpu) == 1365
    assert tokens_at_once(1 << 27, cpu) == 1
