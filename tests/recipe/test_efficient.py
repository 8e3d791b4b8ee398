"""Targets of efficient-llm in a recipe: what is planned and charged, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout as WeightLayout
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.efficient import EfficientTarget
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.load import load_recipe, parse_recipe
from nemo_pvs.recipe.recipe import Recipe
from tests.conftest import tiny_llama_config

CONFIG = {**tiny_llama_config().to_dict(), "model_type": "llama"}
PARENT = WeightLayout.for_config(CONFIG).shape(CONFIG)
PER_STEP = 8 * 32


def recipe(target_layout: dict[str, int] | None = None, **pruning: Any) -> Recipe:
    aware = {"parameters": 0.7 * PARENT.parameters // 1, "tokens": 40 * PER_STEP, **pruning}
    values = {
        "name": "tiny",
        "title": "Tiny",
        "parent": {"source": "nowhere", "config": CONFIG, "pretraining_tokens": 1e6},
        "data": {"source": "text"},
        "targets": {"small": {"method": "efficient-llm", "pruning_aware": aware, "layout": target_layout or {}}},
        "train": {
            "tokens": 4 * PER_STEP,
            "sequence_length": 32,
            "global_batch_size": 8,
            "validation_samples": 8,
            "learning_rate": 1e-3,
        },
        "calibrate": {"sequence_length": 32},
        "evaluate": {"sequence_length": 32},
    }
    return parse_recipe(values, "tiny.yaml")


def test_it_is_planned_and_charged_as_training_of_the_whole_parent() -> None:
    plan = dry_run(recipe(pace="linear"))
    assert plan.stages[:4] == ("parent", "data", "masks/small", "prune/small")
    (target,) = plan.targets
    assert not target.expected.exact
    assert 0.6 * PARENT.parameters < target.expected.shape.parameters <= 0.7 * PARENT.parameters
    (charge,) = target.spent.charges
    assert charge.activity == "mask learning"
    assert charge.tokens == 40 * PER_STEP
    assert charge.flops == charge.tokens * PARENT.flops_per_token(sequence_length=32, training=True)
    pruned, random = (planned.ledger.total.tokens for planned in plan.arms)
    assert pruned == 10**6 + (40 + 4) * PER_STEP
    assert random == 4 * PER_STEP


@pytest.mark.parametrize(
    ("layout", "pruning", "reason"),
    [
        ({}, {"parameters": PARENT.parameters}, "cannot be pruned to"),
        ({}, {"parameters": 100}, "pruned to nothing next"),
        ({}, {"every": 40}, r"takes at least \d+ removals, so [\d,]+ steps, but 10,240 tokens are 40 steps with 1 "),
        ({}, {"start_tokens": 40 * PER_STEP, "pace": "linear"}, "with 0 removals"),
        ({}, {"pace": "linear", "compensation_tokens": 8}, "the first token of each of the 8 sequences of a step"),
        ({"tensor_parallel": 2}, {"pace": "linear"}, r"must divide pruning_aware\.groups_at_once \(1\)"),
        ({"data_parallel": 2}, {"pace": "linear", "layout": {"data_parallel": 3}}, "not a multiple of"),
        ({}, {"pace": "linear", "layout": {"tensor_parallel": 3}}, "[Tt]ensor parallel"),
    ],
)
def test_what_cannot_be_reached_is_refused(layout, pruning, reason) -> None:
    with pytest.raises(UserError, match=reason):
        dry_run(recipe(layout, **pruning))


def test_a_target_that_says_nothing_is_refused() -> None:
    values = recipe().model_dump()
    values["targets"]["small"] = {"method": "efficient-llm"}
    with pytest.raises(UserError, match="nothing says how much to remove"):
        dry_run(parse_recipe(values, "tiny.yaml"))


def test_a_block_of_another_method_is_refused() -> None:
    values = recipe().model_dump()
    values["targets"]["small"] |= {"method": "minitron-depth", "layers": 2}
    with pytest.raises(UserError, match="pruning_aware"):
        dry_run(parse_recipe(values, "tiny.yaml"))


def test_a_linear_pace_ends_at_the_target_before_the_last_step() -> None:
    train = recipe().train
    how = PruningAware(parameters=600, tokens=20 * PER_STEP, start_tokens=4 * PER_STEP, pace="linear", pace_end=0.5)
    goals = [how.goal(step, train, 1000) for step in range(4, 20)]
    assert goals == [950, 900, 850, 800, 750, 700, 650, *[600] * 9]
    assert [step for step in range(9) if how.is_due(step, train)] == [4, 5, 6, 7, 8]
    assert [s for s in range(9) if how.model_copy(update={"every": 2}).is_due(s, train)] == [4, 6, 8]


def test_compensation_from_few_tokens_is_doubted() -> None:
    doubt = "256 tokens are few to compensate for 128 inputs"
    for pruning, said in (({"damping": 0.01}, True), ({"damping": 0.01, "compensate": False}, False), ({}, False)):
        made = recipe(pace="linear", **pruning)
        assert (doubt in EfficientTarget(made, made.targets["small"]).describe(PARENT)) is said
    for name in ("efficient_llm/smollm_1p7b", "efficient_llm/llama31_8b", "smollm2_135m/efficient"):
        plan = dry_run(load_recipe(name))
        for target in plan.recipe.targets.values():
            if target.pruning_aware:
                assert "few" not in EfficientTarget(plan.recipe, target).describe(plan.parent)


def test_the_published_settings() -> None:
    plan = dry_run(load_recipe("efficient_llm/smollm_1p7b"))
    assert plan.parent.parameters == pytest.approx(1.71e9, rel=0.005)
    published = plan.parent.replace(kv_groups=24, ffn=4870)
    how = plan.recipe.targets["1.1b"].pruning_aware
    assert abs(published.parameters - how.parameters) < 2e6
    assert how.start_step(plan.recipe.train) == 477
