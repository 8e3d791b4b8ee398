"""What a recipe expects of a target before it is pruned is what pruning makes of it."""

from __future__ import annotations

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.pruning.structured.llm_pruner import plan_llm_pruner
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.options import needs_gradients, needs_scores
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training
from tests.pruning.test_flap import TINY
from tests.pruning.test_llm_pruner import make_scores


@pytest.mark.parametrize("structure", ["UL-UM", "UL-MM"])
@pytest.mark.parametrize("protected", [{}, {"protect_first": 1, "protect_last": 2}])
def test_the_shape_of_a_target_by_gradients(structure: str, protected: dict[str, int]) -> None:
    settings = {"ratio": 0.22, "structure": structure, **protected}
    expected = expected_shape(Target(method="llm-pruner", **settings), TINY)
    assert expected.exact
    assert expected.shape == plan_llm_pruner(make_scores(), **settings).target
    assert bool(expected.shape.uneven) == bool(protected)


def test_where_layers_are_compared_it_is_only_about_that() -> None:
    settings = {"ratio": 0.22, "structure": "AL-AM", "protect_first": 1}
    expected = expected_shape(Target(method="llm-pruner", **settings), TINY)
    planned = plan_llm_pruner(make_scores(), **settings).target
    assert not expected.exact
    assert expected.shape.matrix_parameters == pytest.approx(planned.matrix_parameters, rel=0.02)


def test_gradients_are_charged_to_those_who_need_them() -> None:
    taylor, flap = (Target(method=method, ratio=0.2) for method in ("llm-pruner", "flap"))
    assert needs_scores(taylor)
    assert needs_gradients(taylor)
    assert not needs_gradients(flap)


@pytest.mark.parametrize("method", ["minitron-width", "minitron-joint"])
def test_heads_are_merged_only_where_heads_are_removed(method: str) -> None:
    shape = TINY.replace(heads=8, kv_groups=4)
    with pytest.raises(UserError, match="the target keeps all 2 query heads of each KV group; give heads"):
        expected_shape(Target(method=method, hidden=shape.hidden // 2, merge_heads=True), shape)
    assert expected_shape(Target(method=method, heads=4, merge_heads=True), shape).shape.heads_per_group == 1


def test_fp8_asks_for_shards_that_suit_it() -> None:
    training = Training(
        tokens=1e6, sequence_length=64, global_batch_size=8, learning_rate=1e-3, validation_samples=8, precision="fp8"
    )
    even = TINY.replace(hidden=64, ffn=96)
    check_training(training, Parallelism(), even)
    with pytest.raises(UserError, match="FP8 needs shards that are multiples of 16, but ffn=100 is not"):
        check_training(training, Parallelism(), even.replace(ffn=100))
    check_training(training, Parallelism(), even.replace(ffn=100), exact=False)


def test_an_overlap_that_cannot_be_is_refused() -> None:
    settings = {"tokens": 1e6, "sequence_length": 64, "global_batch_size": 8, "learning_rate": 1e-3}
    training = Training(**settings, validation_samples=8, precision="fp8")
    even = TINY.replace(hidden=64, ffn=96, kv_groups=4, heads=8)
    layout = Parallelism(tensor_parallel=2, sequence_parallel=True, tp_overlap=True)
    with pytest.raises(UserError, match="tp_overlap cannot be combined with precision fp8"):
        check_training(training, layout, even)
    check_training(training.model_copy(update={"precision": "bf16"}), layout, even)
    with pytest.raises(UserError, match="tp_overlap needs sequence_parallel"):
        check_training(training, Parallelism(tensor_parallel=2, tp_overlap=True), even)
