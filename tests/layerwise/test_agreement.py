from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_pvs.layerwise.agreement import compare_logits
from tests.conftest import tiny_llama_config
from tests.state_source import StateSource

IDS = torch.randint(0, 128, (3, 17), generator=torch.Generator().manual_seed(1))


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_llama_config()).eval()


def test_differences_are_those_of_the_full_models():
    one, other = make_model(0), make_model(1)
    measured = compare_logits(StateSource(one), StateSource(other), IDS)
    with torch.no_grad():
        a, b = one(IDS).logits, other(IDS).logits
    assert measured.tokens == IDS.numel()
    assert measured.max_difference == pytest.approx(float((a - b).abs().max()), rel=1e-4)
    assert measured.mean_difference == pytest.approx(float((a - b).abs().mean()), rel=1e-4)
    assert str(measured).startswith(f"logits on 51 tokens that differ by at most {measured.max_difference:.2g}, ")
    assert measured.top1 == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).float().mean()))


def test_a_model_agrees_with_itself():
    model = make_model(0)
    measured = compare_logits(StateSource(model), StateSource(model), IDS)
    assert (measured.max_difference, measured.mean_difference, measured.top1) == (0.0, 0.0, 1.0)
    assert str(measured) == "equal logits on 51 tokens"
