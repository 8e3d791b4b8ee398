"""Targets in rounds of pruning: what each prunes to, its share of one training, what it costs, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.equal_terms import arm_cost, pruning_cost
from nemo_pvs.planning.rounds import adapt_parameters, round_targets, shares
from nemo_pvs.planning.targets import check_recipe, expected_shape
from nemo_pvs.pruning.target import shrunk
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.training.learning_rate import linear_warmup

PARENT = Shape(layers=8, hidden=64, ffn=192, heads=8, kv_groups=4, head_dim=16, vocab=128, tied=True)
CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}


def recipe_of(target: dict[str, Any], **changes: Any) -> Recipe:
    """Return a recipe of 50 steps of 128 tokens with one target."""
    values = {
        "name": "tiny",
        "title": "A tiny run",
        "parent": {"source": "parent", "pretraining_tokens": 1e6},
        "data": {
            "source": "corpus.jsonl",
            "split": {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1},
        },
        "calibrate": {"samples": 8, "sequence_length": 32, "scan_samples": 4},
        "targets": {"one": target},
        "train": {
            "tokens": 50 * 128,
            "sequence_length": 32,
            "global_batch_size": 4,
            "learning_rate": 1e-3,
            "decay_fraction": 0.1,
            "validation_samples": 8,
        },
    }
    return parse_recipe({**values, **changes}, "test")


def adapt(**changes: Any) -> dict[str, Any]:
    return {"method": "adapt-pruner", "ratio": 0.5, "stages": 4, **changes}


def test_rounds_share_one_training() -> None:
    """Steps and tokens follow each other without a gap, and differ by one step at most."""
    recipe = recipe_of(
        adapt(stages=7), data={**recipe_of(adapt()).data.model_dump(), "token_ranges": {"pruned": [640, 1e6]}}
    )
    arm, scratch = recipe.runs
    parts = shares(recipe, arm)
    assert [part.first_step for part in parts] == [0, 7, 14, 21, 28, 35, 42]
    assert [part.training.steps for part in parts] == [7, 7, 7, 7, 7, 7, 8]
    assert {part.all_steps for part in parts} == {50}
    ends = [part.first_token + part.training.steps * 128 for part in parts]
    assert [part.first_token for part in parts] == [640, *ends[:-1]]
    assert ends[-1] == arm.first_token + arm.tokens
    (whole,) = shares(recipe, scratch)
    assert (whole.training, whole.first_step, whole.all_steps) == (scratch.training, 0, None)


def test_parameters_go_in_equal_portions_of_all() -> None:
    """376.1 M to 143.1 M in 20 rounds is 3.1 % of the first model at each (methods.md, 12.1)."""
    target = recipe_of(adapt(stages=20, ratio=1 - 143.1 / 376.1)).targets["one"]
    left = [PARENT.parameters, *(adapt_parameters(target, PARENT, number) for number in range(1, 21))]
    for before, after in pairwise(left):
        assert (before - after) / left[0] == pytest.approx(0.031, abs=2e-4)
    assert left[-1] == pytest.approx(left[0] * 143.1 / 376.1, abs=1)


def test_what_is_expected_has_about_the_parameters_of_each_round() -> None:
    target = recipe_of(adapt()).targets["one"]
    for number, (_, shape) in enumerate(round_targets(target, PARENT), 1):
        wanted = adapt_parameters(target, PARENT, number)
        assert abs(shape.parameters - wanted) <= 3 * 64 * 8
    assert not expected_shape(target, PARENT).exact
    with pytest.raises(UserError, match="leave nothing"):
        shrunk(PARENT, PARENT.vocab * PARENT.hidden)


def test_minitron_in_rounds_ends_at_its_target() -> None:
    width = recipe_of({"method": "minitron-width", "hidden": 32, "ffn": 96, "stages": 4}).targets["one"]
    shapes = [shape for _, shape in round_targets(width, PARENT)]
    assert [(shape.hidden, shape.ffn) for shape in shapes] == [(56, 168), (48, 144), (40, 120), (32, 96)]
    depth = recipe_of({"method": "minitron-depth", "ratio": 0.5, "stages": 2}).targets["one"]
    assert [(asked.layers, asked.ratio, asked.stages) for asked, _ in round_targets(depth, PARENT)] == [
        (6, None, None),
        (4, None, None),
    ]


def test_query_heads_go_in_rounds_too() -> None:
    """From 8 heads in 4 groups to 2 in 2: groups and the heads of a group are both halved, one after the other."""
    target = recipe_of({"method": "minitron-width", "kv_groups": 2, "heads": 2, "stages": 2}).targets["one"]
    targets = round_targets(target, PARENT)
    assert [(shape.kv_groups, shape.heads) for _, shape in targets] == [(3, 6), (2, 2)]
    assert [asked.sizes["heads"] for asked, _ in targets] == [6, 2]
    follow = recipe_of({"method": "minitron-width", "kv_groups": 2, "stages": 2}).targets["one"]
    assert ["heads" in asked.sizes for asked, _ in round_targets(follow, PARENT)] == [False, False]


def test_every_round_is_charged_at_its_own_size() -> None:
    recipe = recipe_of(adapt())
    arm = recipe.runs[0]
    final = expected_shape(recipe.targets["one"], PARENT).shape
    ledger = arm_cost(recipe, arm, final, PARENT)
    shapes = [shape for _, shape in round_targets(recipe.targets["one"], PARENT)]
    parts = shares(recipe, arm)
    assert ledger.training.tokens == arm.tokens
    assert ledger.training.flops == sum(
        part.training.steps * 128 * shape.flops_per_token(sequence_length=32, training=True)
        for part, shape in zip(parts, shapes, strict=True)
    )
    calibration = pruning_cost(recipe, recipe.targets["one"], final, PARENT).charges
    assert len(calibration) == 4
    # Of the 50 iterations a round gets the share that its matrices are of all that are left.
    lost = [1 - after.matrix_parameters / before.matrix_parameters for before, after in pairwise([PARENT, *shapes])]
    for charge, share in zip(calibration, lost, strict=True):
        assert charge.tokens == pytest.approx(share * 50 * 8 * 32, abs=8 * 32)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (adapt(stages=51), "51 rounds but trains for 50 steps"),
        ({"method": "flap", "ratio": 0.2, "stages": 2}, "flap has no rounds of pruning"),
        ({"method": "minitron-depth", "layers": 6, "stages": 3}, "round [12] of 3 would remove nothing"),
        ({"method": "minitron-depth", "layers": 6, "stages": 2, "task": "continuation"}, "leave out task"),
        (adapt(stages=1, slice_optimizer_state=True), "between rounds of pruning; give stages"),
        (adapt(ratio=0.99), "leave nothing for the layers"),
        (
            {"method": "minitron-width", "heads": 4, "merge_heads": True, "stages": 2, "slice_optimizer_state": True},
            "leave out merge_heads, or slice_optimizer_state",
        ),
    ],
)
def test_rounds_that_cannot_be_are_refused(target: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_recipe(recipe_of(target), PARENT, CONFIG)


def test_rounds_have_one_budget() -> None:
    with pytest.raises(UserError, match="one budget"):
        check_recipe(recipe_of(adapt(), budgets=[6400, 12800]), PARENT, CONFIG)


def test_adapt_pruner_wants_a_ratio_and_a_cosine_no_decay() -> None:
    with pytest.raises(UserError, match="how much to remove"):
        recipe_of({"method": "adapt-pruner", "stages": 2})
    train = recipe_of(adapt()).train.model_dump()
    with pytest.raises(UserError, match="decay_fraction"):
        recipe_of(adapt(), train={**train, "warmup": "quadratic"})


def test_warm_up_stable_decay() -> None:
    """Of 100 steps 5 go up, 85 stay and 10 go down to a tenth."""
    rates = [linear_warmup(step, steps=100, warmup_steps=5, min_ratio=0.1, decay_steps=10) for step in range(101)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert set(rates[5:91]) == {1.0}
    assert rates[91:] == pytest.approx([1 - 0.09 * step for step in range(1, 11)])
