"""Width and depth from one set of scores."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.joint import plan_joint
from nemo_pvs.pruning.structured.shortgpt import plan_shortgpt
from nemo_pvs.pruning.structured.width import plan_width
from tests.pruning.test_depth import LAYERS, six_layers, token_set
from tests.state_source import StateSource, as_transformers, random_ids


def test_either_alone_is_the_method_of_its_own() -> None:
    scores = calibrate(StateSource(six_layers()), token_set())
    narrow = scores.shape.replace(hidden=48, ffn=64)
    assert plan_joint(scores, narrow) == plan_width(scores, narrow)
    assert plan_joint(scores, narrow, "meanabs_l2") == plan_width(scores, narrow, "meanabs_l2")
    shallow = plan_joint(scores, scores.shape.replace(layers=4))
    assert shallow.keep_layers == plan_shortgpt(scores, 2).keep_layers
    assert shallow.keep_hidden == tuple(range(64))


@pytest.mark.parametrize("sizes", [{"kv_groups": 1}, {"heads": 4}], ids=["groups", "heads"])
def test_both_at_once_is_one_after_the_other(sizes: dict[str, int]) -> None:
    """The same logits as a width plan whose model then loses its layers in transformers."""
    source = StateSource(six_layers())
    scores = calibrate(source, token_set())
    target = scores.shape.replace(layers=4, hidden=48, ffn=64, **sizes)
    plan = plan_joint(scores, target, merge_heads=True)
    assert bool(plan.merged_heads) == ("heads" in sizes)
    assert Plan.from_json(plan.to_json()) == plan
    both = as_transformers(PrunedSource(source, plan))
    one = as_transformers(PrunedSource(source, plan_width(scores, target.replace(layers=LAYERS), merge_heads=True)))
    for layer in sorted(set(range(LAYERS)) - set(plan_shortgpt(scores, 2).keep_layers), reverse=True):
        del one.model.layers[layer]
    ids = random_ids(2, 20).long()
    with torch.no_grad():
        assert torch.equal(both(ids, use_cache=False).logits, one(ids, use_cache=False).logits)


def test_layers_go_in_the_order_that_is_given() -> None:
    scores = calibrate(StateSource(six_layers()), token_set())
    target = scores.shape.replace(layers=4, ffn=64)
    assert plan_joint(scores, target, layer_order=(5, 1, 0)).keep_layers == (0, 2, 3, 4)
    with pytest.raises(UserError, match="has 1 layers, but 2 must be removed to leave 4"):
        plan_joint(scores, target, layer_order=(5,))
