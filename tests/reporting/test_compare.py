from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.reporting.compare.compare import compare, read_runs
from nemo_pvs.reporting.compare.estimates import final_loss, gap, perplexity_after
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.data import arm_rows
from nemo_pvs.reporting.figures.loss import loss_panels
from nemo_pvs.reporting.results import Results
from nemo_pvs.reporting.tables.results import outcome


def _repeated(results: Results, seed: int, shifts: dict[str, float]) -> Run:
    """Return the run with another seed, the losses of each arm higher by so much."""
    other = copy.deepcopy(results)
    other.recipe["train"] = {**other.recipe["train"], "seed": seed}
    for arm in other.arms:
        for point in arm.validation:
            point.loss += shifts.get(arm.name, 0.0)
        arm.test_perplexity_after = 40.0 + seed
    return Run(f"runs/seed{seed}", other)


def _changed(results: Results, change: Callable[[Results], Any]) -> Run:
    other = copy.deepcopy(results)
    change(other)
    return Run("runs/other", other)


def test_seeds_are_shown_as_mean_and_spread(results: Results) -> None:
    shifts = [{"depth, pruned": 0.0}, {"depth, pruned": 0.3}, {"depth, pruned": 0.0, "depth, scratch": 0.6}]
    runs = compare([_repeated(results, seed, shift) for seed, shift in enumerate(shifts)])
    assert len(runs.results.arms) == 4
    arm = runs.results.arms[0]
    assert runs.seeds == 3
    assert [point.loss for point in arm.validation] == pytest.approx([4.1, 2.85, 2.725, 2.64])
    assert final_loss(runs, arm).deviation == pytest.approx(statistics.stdev([2.54, 2.84, 2.54]))
    assert runs.loss_deviations(arm) == pytest.approx(
        dict.fromkeys((0, 13653, 27306, 40960), statistics.stdev([0, 0.3, 0]))
    )
    gaps = [0.10, -0.20, 0.70]
    assert runs.results.gap(arm) == pytest.approx(statistics.fmean(gaps))
    assert gap(runs, arm).deviation == pytest.approx(statistics.stdev(gaps))
    assert arm.test_perplexity_after == 41.0
    assert perplexity_after(runs, arm).deviation == 1.0
    assert [row["runs"] for row in arm_rows(runs)] == [3, 3, 3, 3]
    assert runs.warnings == []


def test_a_run_from_before_a_key_existed_is_a_repetition_too(results: Results) -> None:
    newer = _repeated(results, 1, {})
    newer.results.recipe["train"]["learned_since"] = None
    newer.results.recipe["targets"] = {"width": {"task": None, "ffn": 8}}
    older = _repeated(results, 0, {})
    older.results.recipe["targets"] = {"width": {"ffn": 8}}
    assert compare([older, newer]).seeds == 2
    newer.results.recipe["train"]["learned_since"] = 0
    assert older.identity != newer.identity


def test_one_run_has_no_spread(results: Results) -> None:
    runs = compare([Run("runs/demo", results)])
    assert runs.results == results
    for arm in results.arms:
        assert runs.loss_deviations(arm) == {}
        assert final_loss(runs, arm).deviation is perplexity_after(runs, arm).half_width is None
    assert gap(runs, results.arms[0]).half_width is None


def test_an_arm_that_one_seed_lacks_is_said_and_not_counted(results: Results) -> None:
    second = _repeated(results, 1, {})
    del second.results.arms[3]
    runs = compare([_repeated(results, 0, {}), second])
    assert [row["runs"] for row in arm_rows(runs)] == [2, 2, 2, 1]
    assert runs.warnings == ["“width, scratch” is missing in runs/seed1; its mean is over the other seeds."]


def test_a_missing_arm_is_missing_and_not_zero(results: Results) -> None:
    results.recipe["targets"] = {"depth": {}, "width": {}, "joint": {"method": "minitron-joint"}}
    del results.arms[3]
    runs = compare([Run("runs/demo", results)])
    assert runs.missing == [("width", "random"), ("joint", "pruned"), ("joint", "random")]
    assert "The arms from random weights on width and joint are missing: nothing is known of them." in runs.warnings
    assert "The arm from the pruned parent on joint is missing: nothing is known of it." in runs.warnings
    row = arm_rows(runs)[3]
    named = {"arm": "width, random", "target": "width", "initialisation": "random", "runs": 0}
    assert {name: value for name, value in row.items() if value is not None} == named


@pytest.mark.slow
def test_an_arm_that_no_recipe_asks_for_is_not_missing(results: Results) -> None:
    results.recipe |= {"targets": {"depth": {}, "width": {"arms": ["pruned"]}}, "arms": ["pruned", "random"]}
    del results.arms[3]
    runs = compare([Run("runs/demo", results)])
    assert runs.missing == []
    assert runs.warnings == ["No arm from random weights was asked for on width, so there is no gap."]
    assert len(arm_rows(runs)) == 3
    assert "missing" in loss_panels(runs.results)[1]
    assert "missing" not in loss_panels(runs.results, missing=runs.missing)[1]
    results.recipe["arms"] = ["pruned"]
    results.recipe["targets"]["width"] = {}
    assert compare([Run("runs/demo", results)]).missing == []
    scratch = _changed(results, lambda r: r.recipe.update(arms=["random"]))
    scratch.results.arms = []
    runs = compare([Run("runs/demo", results), scratch])
    assert runs.missing == [("width", "random")], "the second run asks for it"


def test_an_arm_whose_counterpart_cost_something_else_stands_alone(results: Results) -> None:
    results.arms[3].ledger = Ledger()
    results.arms[3].ledger.charge("training", 9 * 40_960, results.arms[3].shape, 64, training=True)
    assert compare([Run("runs/demo", results)]).warnings == [
        "“width, pruned” has no counterpart from random weights that cost the same."
    ]


def test_a_parent_that_was_trained_on_needs_no_counterpart(results: Results) -> None:
    results.arms = results.arms[:1]
    results.arms[0].method = "dense"
    assert compare([Run("runs/demo", results)]).missing == []


def test_a_loss_that_is_not_finite_is_one_sentence(results: Results) -> None:
    for point in results.arms[1].validation[2:]:
        point.loss = math.nan
    assert compare([Run("runs/demo", results)]).warnings == [
        "The validation loss of “depth, scratch” is not a finite number after 27,306 tokens: it diverged, and such "
        "points are left out of the figures."
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r.hashes.update(tokenizer="2"),
            "tokenizer differs, its SHA-256 is 1 in runs/demo and 2 in runs/other",
        ),
        (lambda r: r.hashes.update({"train tokens": "2"}), "data order differs, the SHA-256 of train tokens"),
        (lambda r: r.recipe["data"].update(seed=9), "data order differs, data.seed is 0 in runs/demo and 9 in"),
        (
            lambda r: r.recipe["data"].update(token_files={"train": [0.5, "a", 0.5, "b"]}),
            "data order differs, the blend of the training files is 0.7, 0.3 in runs/demo and 0.5, 0.5 in",
        ),
        (
            lambda r: r.recipe["data"].update(token_files={"train": ["a", "b"]}),
            "data order differs, the blend of the training files is 0.7, 0.3 in runs/demo and their sizes in",
        ),
        (lambda r: r.recipe["train"].update(seed=9, steps=5), "data order differs, its seed is None in"),
        (lambda r: r.hashes.update({"validation tokens": "2"}), "validation set differs, the SHA-256 of its tokens"),
        (lambda r: r.recipe["train"].update(validation_samples=9), "validation set differs, train.validation_samples"),
        (lambda r: r.hashes.update({"test tokens": "2"}), "test set differs"),
        (lambda r: r.hashes.update({"parent weights": "2"}), "parent differs, the SHA-256 of its weights"),
        (lambda r: setattr(r.parent, "shape", r.arms[0].shape), "architecture differs, the parent's shape"),
        (
            lambda r: [setattr(arm, "shape", r.parent.shape) for arm in r.arms[:2]],
            "architecture differs, the shape of depth",
        ),
    ],
)
def test_what_is_not_comparable_is_refused_with_the_field(
    results: Results, change: Callable[[Results], Any], message: str
) -> None:
    names = ("tokenizer", "train tokens", "validation tokens", "test tokens", "parent weights")
    results.hashes |= dict.fromkeys(names, "1")
    results.recipe["train"]["validation_samples"] = 8
    results.recipe["data"]["token_files"] = {"train": [0.7, "a", 0.3, "b"]}
    other = _changed(results, change)
    other.results.recipe["more"] = True  # not a repetition
    runs = [Run("runs/demo", results), other]
    with pytest.raises(UserError, match="not comparable") as caught:
        compare(runs)
    assert message in str(caught.value)
    assert "--force" in str(caught.value)
    forced = compare(runs, force=True)
    assert any(message in difference for difference in forced.differences)
    assert forced.warnings[0].startswith("These runs are not comparable, but were put side by side anyway")


def test_runs_of_which_the_first_says_nothing_are_compared_too(results: Results) -> None:
    of_depth = _changed(results, lambda r: r.recipe.update(more=1))
    of_depth.results.arms = of_depth.results.arms[:2]
    pruned = Run("runs/pruned", _changed(results, lambda r: r.recipe.update(more=2)).results)
    scratch = Run("runs/scratch", _changed(results, lambda r: r.recipe.update(more=3)).results)
    pruned.results.arms, scratch.results.arms = pruned.results.arms[2:3], scratch.results.arms[3:]
    assert compare([of_depth, pruned, scratch]).differences == ()
    scratch.results.arms[0].shape = of_depth.results.arms[0].shape
    with pytest.raises(UserError, match=r"the shape of width is .* in runs/pruned and .* in runs/scratch"):
        compare([of_depth, pruned, scratch])


def test_shapes_are_compared_seed_by_seed(results: Results) -> None:
    """As scores of each seed's own parent decide them."""
    pruned, scratch = ([_repeated(results, seed, {}) for seed in (1, 2)] for _ in range(2))
    for run, other in zip(pruned, scratch, strict=True):
        shape = run.results.arms[0].shape.replace(ffn=96 + 8 * run.seed)
        run.results.arms, other.results.arms = run.results.arms[:1], other.results.arms[1:2]
        run.results.arms[0].shape = other.results.arms[0].shape = shape
        other.results.recipe["more"] = True
    assert compare([*pruned, *scratch]).differences == ()
    scratch[1].results.arms[0].shape = scratch[0].results.arms[0].shape
    with pytest.raises(UserError, match=r"the shape of depth is .* in runs/seed2 and .* in runs/seed2"):
        compare([*pruned, *scratch])


def test_the_seeds_that_recipes_do_not_share_are_named(results: Results) -> None:
    twice = [_repeated(results, seed, {}) for seed in (1, 2)]
    once = Run("runs/other", copy.deepcopy(_repeated(results, 3, {}).results))
    once.results.recipe["more"] = True
    once.results.arms = once.results.arms[:1]
    with pytest.raises(UserError, match=r"its seed is 1 in runs/seed1 and 2 in runs/seed2 and 3 in runs/other"):
        compare([*twice, once])


def test_a_recipe_with_an_unfinished_seed_is_compared_by_the_others(results: Results) -> None:
    twice = [_repeated(results, seed, {}) for seed in (1, 2)]
    once = Run("runs/other", copy.deepcopy(twice[0].results))
    once.results.recipe["more"] = True
    assert compare([*twice, once]).differences == ()
    assert compare([once, *twice]).differences == ()


def test_the_headline_names_no_winner_within_the_error_of_the_seeds(results: Results) -> None:
    """Gaps on depth of +0.30, -0.20 and -0.02: their mean is positive, and its interval holds zero."""
    scratch = next(arm.name for arm in results.arms if arm.initialisation == "random")
    shifts = [gap - 0.10 for gap in (0.30, -0.20, -0.02)]
    runs = compare([_repeated(results, seed, {scratch: shift}) for seed, shift in enumerate(shifts)])
    said = outcome(runs.results, runs)
    assert "on depth pruning was ahead by 0.03 nats per token, within the error of 3 seeds" in said
    assert "on width training from scratch won by 0.20 nats per token" in said


def test_what_a_run_does_not_say_is_no_difference(results: Results) -> None:
    other = _changed(results, lambda r: r.recipe.update(more=True))
    other.results.hashes["tokenizer"] = "1"
    assert compare([Run("runs/demo", results), other]).differences == ()


def test_equal_arms_of_two_recipes_stay_apart(results: Results) -> None:
    other = _changed(results, lambda r: r.recipe.update(more=True))
    for point in other.results.arms[0].validation:
        point.loss -= 0.5
    runs = compare([Run("runs/demo", results), other])
    assert list(runs.results.targets) == ["depth", "width", "depth (runs/other)", "width (runs/other)"]
    names = [arm.name for arm in runs.results.arms]
    assert len(set(names)) == 8
    assert runs.results.gap(runs.results.arms[4]) == pytest.approx(0.6)
    assert runs.missing == []


def test_what_another_recipe_asks_for_is_not_missing_from_a_target_that_was_renamed(results: Results) -> None:
    both, pruned = {"depth": {}, "width": {}}, {"depth": {"arms": ["pruned"], "learning_rate": 1e-3}}
    other = _changed(results, lambda r: r.recipe.update(targets=pruned))
    other.results.arms = other.results.arms[:1]
    results.recipe["targets"] = both
    runs = compare([Run("runs/demo", results), other])
    assert list(runs.results.targets) == ["depth", "width", "depth (runs/other)"]
    assert runs.missing == []
    assert runs.warnings == ["No arm from random weights was asked for on depth (runs/other), so there is no gap."]
    del results.arms[1]
    assert compare([Run("runs/demo", results), other]).missing == [("depth", "random")]
    assert compare([other, Run("runs/demo", results)]).missing == [("depth (runs/demo)", "random")]


def test_an_arm_without_a_budget_is_not_missing(results: Results) -> None:
    results.recipe |= {"targets": {"width": {}}, "budgets": {"pruned": [], "random": [40_960]}}
    results.arms = results.arms[3:]
    runs = compare([Run("runs/demo", results)])
    assert runs.missing == []
    assert runs.warnings == ["No arm from the pruned parent was asked for on width, so there is no gap."]


def test_pruned_and_scratch_may_be_two_runs(results: Results) -> None:
    other = _changed(results, lambda r: r.recipe.update(more=True))
    whole, other.results.arms = results.arms, other.results.arms[1::2]
    results.arms = whole[::2]
    runs = compare([Run("runs/demo", results), other])
    assert runs.missing == []
    assert [runs.results.gap(arm) for arm in runs.results.arms] == [
        pytest.approx(0.10),
        pytest.approx(-0.20),
        None,
        None,
    ]


def test_the_same_run_is_no_repetition_of_itself(results: Results, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one recipe with one seed"):
        compare([Run("runs/demo", results), Run("runs/copy", results)])
    first, second = _repeated(results, 1, {}), _repeated(results, 2, {})
    again = Run("runs/copy", first.results)
    with pytest.raises(UserError, match=r"runs/seed1 and runs/copy are one recipe with one seed \(1\)"):
        compare([first, second, again])
    results.save(tmp_path / "results.json")
    with pytest.raises(UserError, match="given twice"):
        read_runs([str(tmp_path), f"{tmp_path}/."])


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json does not exist"):
        read_runs([str(tmp_path)])
