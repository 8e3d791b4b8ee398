"""What no scores can change is refused before any are measured, which takes long on a large model."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from tests import families
from tests.pruning.test_depth_methods import pruned_by
from tests.state_source import StateSource, tiny_model


def measure() -> Any:
    pytest.fail("it measured scores")


def splits_in_two(shape: Shape) -> None:
    shape.check_parallel(tensor_parallel=2)


@pytest.mark.parametrize(
    ("method", "source", "options", "message"),
    [
        ("flap", StateSource(families.tiny_model("mistral")), {}, "mistral has no .*bias; use a method that adds no"),
        (
            "flap",
            StateSource(tiny_model()),
            {"structure": "UL-MM", "remove_groups": 2},
            "Cannot remove 2 of 2 KV groups",
        ),
        ("llm-pruner", StateSource(tiny_model()), {"protect_first": 4}, "Cannot protect 4 of 4 layers"),
        ("wanda-sp", StateSource(tiny_model()), {}, "Tensor parallelism 2 does not divide kv_groups=1"),
        ("magnitude-sp", StateSource(tiny_model()), {}, "Tensor parallelism 2 does not divide kv_groups=1"),
    ],
)
def test_before_scores_are_measured(method: str, source: WeightSource, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pruned_by(method, source, check=splits_in_two, measured=measure, ratio=0.5, **options)


def test_a_family_without_biases_is_pruned_without_them() -> None:
    source = StateSource(families.tiny_model("mistral"))
    plan = pruned_by("flap", source, ratio=0.3, bias=False, uniform=True).plan
    assert plan is not None
    assert plan.target.features == plan.parent.features
