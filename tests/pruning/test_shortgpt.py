"""Which layers go by block influence."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.structured.shortgpt import plan_shortgpt, removal_order
from tests.pruning.test_depth import LAYERS, six_layers, token_set
from tests.pruning.test_width import make_scores
from tests.state_source import StateSource


def test_the_smallest_influence_goes_the_later_of_equals_first() -> None:
    scores = make_scores(block_influence=[0.2, 0.2])
    assert removal_order(scores) == (1, 0)
    assert plan_shortgpt(scores, 1).keep_layers == (0,)
    assert plan_shortgpt(make_scores(block_influence=[0.1, 0.2]), 1).keep_layers == (1,)
    assert plan_shortgpt(make_scores(block_influence=[0.1, 0.2]), 1, protect_first=1).keep_layers == (0,)


def test_hidden_states_by_hand_say_the_same() -> None:
    """An oracle in float64: transformers' own hidden states, layer by layer."""
    model, tokens = six_layers(), token_set()
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: states.extend((inputs[0], output)))
    scores = calibrate(StateSource(six_layers()), tokens)
    with torch.no_grad():
        model(tokens.ids.long())
    influence = []
    for before, after in zip(states[::2], states[1::2], strict=True):
        x, y = before.double(), after.double()
        cosine = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
        influence.append(float(1 - cosine.mean()))
    assert plan_shortgpt(scores, 3).provenance["block_influence"] == pytest.approx(influence, rel=1e-5)
    for remove in range(1, LAYERS):
        gone = sorted(range(LAYERS), key=influence.__getitem__)[:remove]
        plan = plan_shortgpt(scores, remove)
        assert plan.keep_layers == tuple(layer for layer in range(LAYERS) if layer not in gone)
        assert plan.method == "shortgpt"
        assert plan.target == scores.shape.replace(layers=LAYERS - remove)


def test_a_layer_that_adds_nothing_goes_first() -> None:
    model = six_layers()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    scores = calibrate(StateSource(model), token_set())
    assert plan_shortgpt(scores, 1).keep_layers == (0, 1, 3, 4, 5)
    assert plan_shortgpt(scores, 1, protect_first=3, protect_last=2).keep_layers == (0, 1, 2, 4, 5)


def test_impossible_removals_are_refused() -> None:
    scores = make_scores(block_influence=[0.1, 0.2])
    with pytest.raises(UserError, match="Cannot remove 2 of 2 layers"):
        plan_shortgpt(scores, 2)
    with pytest.raises(UserError, match="protect fewer"):
        plan_shortgpt(scores, 1, protect_first=1, protect_last=1)
