"""Random weights are distributed as the schemes say, matrix by matrix, and the default's bits are what they were."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_pvs.checkpoints.transforms.initialisation import InitialisationScheme
from nemo_pvs.checkpoints.transforms.random import RandomSource
from tests.conftest import tiny_llama_config

HIDDEN, FFN, VOCAB, HEADS, GROUPS, LAYERS = 128, 512, 1000, 8, 2, 4
HEAD = HIDDEN // HEADS
CONFIG = tiny_llama_config(hidden_size=HIDDEN, intermediate_size=FFN, vocab_size=VOCAB).to_dict()
LAYER = "model.layers.2"

# The variance of a standard normal cut off at -2 and 2 is 1 - 4 phi(2) / (2 Phi(2) - 1).
CUT_OFF = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))

MAXTEXT = {
    "model.embed_tokens.weight": (0.02 * CUT_OFF, 0.04),
    f"{LAYER}.self_attn.q_proj.weight": (1 / math.sqrt(HIDDEN * HEAD), None),
    f"{LAYER}.self_attn.k_proj.weight": (1 / math.sqrt(HIDDEN), None),
    f"{LAYER}.self_attn.v_proj.weight": (1 / math.sqrt(HIDDEN), None),
    f"{LAYER}.self_attn.o_proj.weight": (1 / math.sqrt(HEADS * HEAD), None),
    f"{LAYER}.mlp.gate_proj.weight": (1 / math.sqrt(HIDDEN), 2 / CUT_OFF / math.sqrt(HIDDEN)),
    f"{LAYER}.mlp.up_proj.weight": (1 / math.sqrt(HIDDEN), 2 / CUT_OFF / math.sqrt(HIDDEN)),
    f"{LAYER}.mlp.down_proj.weight": (1 / math.sqrt(FFN), 2 / CUT_OFF / math.sqrt(FFN)),
    "lm_head.weight": (1 / math.sqrt(HIDDEN), 2 / CUT_OFF / math.sqrt(HIDDEN)),
}
"""The standard deviation and the bound of each kind of matrix."""


def _draw(scheme: InitialisationScheme, name: str) -> torch.Tensor:
    return RandomSource(CONFIG, 3, initialisation=scheme).read(name).double()


@pytest.mark.parametrize("name", MAXTEXT)
def test_maxtext(name: str) -> None:
    deviation, bound = MAXTEXT[name]
    drawn = _draw("maxtext", name)
    # Five standard errors of a mean and of a standard deviation.
    assert abs(float(drawn.mean())) < 5 * deviation / drawn.numel() ** 0.5
    assert float(drawn.std()) == pytest.approx(deviation, rel=5 / (2 * drawn.numel()) ** 0.5)
    kurtosis = float((drawn**4).mean() / drawn.var() ** 2)
    if bound is None:
        assert drawn.abs().max() > 3 * deviation
        assert kurtosis == pytest.approx(3, abs=5 * (24 / drawn.numel()) ** 0.5)
    else:
        assert 0.99 * bound < drawn.abs().max() <= bound * (1 + 1e-6)
        assert kurtosis == pytest.approx(2.37, abs=0.15)  # 2.3652 of a normal cut off at 2


def test_maxtext_does_not_ask_for_depth_or_heads() -> None:
    """MaxText's deviations are those of one matrix alone; Megatron's shrink with the depth of the model."""
    deep = {**CONFIG, "num_hidden_layers": 16}
    for scheme, equal in (("maxtext", True), ("megatron", False)):
        one, other = (
            RandomSource(config, 3, initialisation=scheme).read(f"{LAYER}.mlp.down_proj.weight")
            for config in (CONFIG, deep)
        )
        assert torch.equal(one, other) == equal


@pytest.mark.parametrize("name", MAXTEXT)
def test_normal(name: str) -> None:
    drawn = _draw("normal", name)
    assert float(drawn.std()) == pytest.approx(0.02, rel=5 / (2 * drawn.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("model.embed_tokens.weight", [-0.01943262852728367, 0.0022212036419659853, 0.0010007404489442706]),
        ("model.layers.1.mlp.down_proj.weight", [0.010512412525713444, 0.004655883647501469, -0.0023849972058087587]),
        ("model.layers.0.self_attn.q_proj.weight", [-0.00160276424139738, 0.0016086524119600654, -0.0021250140853225]),
    ],
)
def test_the_default_draws_what_it_always_drew(name: str, first: list[float]) -> None:
    assert RandomSource(CONFIG, 7).read(name).flatten()[:3].tolist() == pytest.approx(first, rel=1e-6)
