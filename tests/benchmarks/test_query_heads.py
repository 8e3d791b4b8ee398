"""The benchmark of query heads inside their groups, on a model without meaning."""

from __future__ import annotations

import pytest

from nemo_pvs.calibration.engine import calibrate
from tests.benchmarks.query_heads import plans, row
from tests.calibration.test_engine import token_set
from tests.state_source import StateSource, tiny_model


@pytest.mark.slow
def test_a_row_per_choice_of_heads() -> None:
    source, tokens = StateSource(tiny_model(num_attention_heads=6, std=0.5)), token_set(samples=2)
    scores = calibrate(source, tokens)
    made = dict(plans(scores))
    published, reverse = made["`--target heads=4`"], made["the least important heads stay"]
    for layer in range(scores.shape.layers):  # the most and the least important of three heads
        assert not {*published.removed("query", layer)} & {*reverse.removed("query", layer)}
    rows = {name: row(source, plan, scores.shape, tokens) for name, plan in {"dense": None, **made}.items()}
    assert list(rows) == [
        "dense",
        "`--target heads=4`",
        "`--target heads=4 --merge-heads`",
        "`--target heads=4 --aggregation meanabs_l2`",
        "the least important heads stay",
        "random heads",
        "heads by FLAP's score, without biases",
        "`--target kv_groups=1`",
    ]
    assert len({loss for _, loss in rows.values()}) >= 6
    *fewer_heads, fewer_groups = (plan.target.parameters for plan in made.values())
    assert scores.shape.parameters > fewer_heads[0] == max(fewer_heads) == min(fewer_heads) > fewer_groups
