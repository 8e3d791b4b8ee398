"""A teacher that answers once for all arms: what its caches cover, who pays how much, and what is refused."""

from __future__ import annotations

import shutil
from fractions import Fraction
from typing import Any

import pytest

from nemo_pvs.cli.dry_run_table import plan_hours, show_series, teacher_hours
from nemo_pvs.data.teacher_cache import CacheContent
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.budget import scratch_budget
from nemo_pvs.ledger.ledger import SHARED_ANSWERS, Charge, Ledger
from nemo_pvs.planning.cached_teacher import bytes_per_token, cached_ranges, disk_warning, teacher_share
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.gpu_time import gpu_hours
from nemo_pvs.planning.pruned_arms import of_recipe
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.recipe.recipe import Recipe
from tests.planning.test_teacher import PARENT, PER_STEP, distilled_recipe

CACHE = {"cache": {"top_k": 16}}


def _lesson(ledger: Ledger) -> Charge:
    (charge,) = (charge for charge in ledger.charges if charge.is_teacher_pass)
    return charge


def _taught(recipe: Recipe) -> list[Charge]:
    return [_lesson(planned.ledger) for planned in dry_run(recipe).arms if planned.arm.training.distill]


def test_two_arms_on_the_same_tokens_pay_half_each():
    online, cached = dry_run(distilled_recipe({})), dry_run(distilled_recipe(CACHE))
    tokens = 4 * PER_STEP
    for planned, whole in zip(cached.arms, online.arms, strict=True):
        charge = _lesson(planned.ledger)
        assert (charge.tokens, charge.note) == (tokens // 2, SHARED_ANSWERS)
        assert 2 * charge.flops == _lesson(whole.ledger).flops
        assert planned.ledger.training == whole.ledger.training


def test_the_whole_is_charged_once_whatever_the_budgets():
    """Arms of different lengths: the longest covers all, and the shares are as the lengths."""
    recipe = distilled_recipe(CACHE, budgets=[2 * PER_STEP, 3 * PER_STEP, 7 * PER_STEP], arms=["pruned", "random"])
    (part,) = cached_ranges(recipe)
    assert (part.first, part.end, len(part.arms)) == (0, 7 * PER_STEP, 6)
    assert teacher_share(recipe) == Fraction(7, 24)
    charges = _taught(recipe)
    assert abs(sum(charge.tokens for charge in charges) - part.tokens) <= len(charges) / 2
    forward = PARENT.flops_per_token(sequence_length=32, training=False)
    assert all(charge.flops == charge.tokens * forward for charge in charges)


@pytest.mark.parametrize(
    ("random", "expected"),
    [
        ([0, 8], [(0, 4)]),
        ([2, 8], [(0, 6)]),
        ([4, 8], [(0, 4), (4, 8)]),
        ([6, 99], [(0, 4), (6, 10)]),
    ],
    ids=["same", "overlapping", "adjacent", "apart"],
)
def test_arms_share_a_cache_where_their_tokens_overlap(random, expected):
    ranges = {"pruned": [0, 4 * PER_STEP], "random": [steps * PER_STEP for steps in random]}
    recipe = distilled_recipe(CACHE, data={"source": "text", "token_ranges": ranges})
    steps = [(part.first // PER_STEP, part.end // PER_STEP) for part in cached_ranges(recipe)]
    assert steps == expected
    taught = sum(end - first for first, end in expected)
    assert teacher_share(recipe) == Fraction(taught, 8)
    assert sum(charge.tokens for charge in _taught(recipe)) == taught * PER_STEP
    assert [stage for stage in dry_run(recipe).stages if stage.startswith("teach/")] == [
        f"teach/{number}" for number, _ in enumerate(expected, 1)
    ]


def test_arms_without_a_teacher_pay_nothing():
    recipe = distilled_recipe({**CACHE, "arms": ["pruned"]})
    assert teacher_share(recipe) == 1
    (charge,) = _taught(recipe)
    assert charge.tokens == 4 * PER_STEP
    assert cached_ranges(distilled_recipe({})) == cached_ranges(distilled_recipe(None)) == []
    assert teacher_share(distilled_recipe({})) == 1


@pytest.mark.parametrize("setting", ["equal-training-tokens", "equal-total-tokens", "equal-total-flops"])
@pytest.mark.parametrize("pretraining", [1e3, 1e5, 1e7])
def test_equal_terms_count_the_shares(setting, pretraining):
    """The pruned arm's cost is within one step of the scratch arm's, although each budget changes all shares."""
    parent = {**distilled_recipe({}).parent.model_dump(), "pretraining_tokens": pretraining}
    recipe = distilled_recipe(CACHE, budget=setting, parent=parent)
    plan = dry_run(recipe)
    pruned, scratch = (planned.ledger for planned in plan.arms)
    kind = "flops" if setting.endswith("flops") else "tokens"
    total = "training" if "training" in setting else "total"
    spent, took = (getattr(getattr(ledger, total), kind) for ledger in (pruned, scratch))
    steps = plan.arms[1].arm.training.steps
    a_step = sum(getattr(charge, kind) for charge in scratch.charges if charge.steps or charge.is_teacher_pass) / steps
    assert abs(took - spent) <= a_step
    assert teacher_share(plan.recipe) == Fraction(plan.arms[1].arm.tokens, sum(one.arm.tokens for one in plan.arms))


def test_pvs_budget_counts_the_share():
    """By hand: the scratch arm pays for its training and half of a forward pass per token."""
    (arm,) = of_recipe(distilled_recipe(CACHE))
    assert arm.scratch_teacher_share == Fraction(1, 2)
    budget = scratch_budget(arm, "equal-total-tokens")
    before = arm.scratch_before.total.tokens
    assert budget.tokens == -(-2 * (arm.ledger.total.tokens - before) // 3)


def test_pvs_budget_settles_the_other_budgets_of_the_recipe_first():
    """Their arms have a part in the share of the teacher."""
    (arm,) = of_recipe(distilled_recipe(CACHE, budget="equal-total-tokens"))
    plan = dry_run(distilled_recipe(CACHE, budget="equal-total-tokens"))
    assert arm.scratch_teacher_share == teacher_share(plan.recipe)
    assert scratch_budget(arm, "equal-total-tokens").steps == plan.arms[1].arm.training.steps


def test_a_range_that_holds_the_final_budgets_is_not_refused_for_those_on_the_way():
    """While every arm still pays for its own teacher, scratch without one would get more tokens than in the end."""
    how = {**CACHE, "arms": ["pruned"]}
    targets = {name: {"method": "minitron-depth", "layers": layers} for name, layers in (("two", 2), ("three", 3))}
    parent = {**distilled_recipe({}).parent.model_dump(), "pretraining_tokens": 1}
    recipe = distilled_recipe(how, budget="equal-total-tokens", targets=targets, parent=parent)
    wanted = max(planned.arm.tokens for planned in dry_run(recipe).arms)
    ranges = {"source": "text", "token_ranges": {"random": [0, wanted]}}
    enough = distilled_recipe(how, budget="equal-total-tokens", targets=targets, parent=parent, data=ranges)
    assert max(planned.arm.tokens for planned in dry_run(enough).arms) == wanted
    ranges["token_ranges"] = {"random": [0, wanted - PER_STEP]}
    with pytest.raises(UserError, match="goes past the end of their range"):
        dry_run(distilled_recipe(how, budget="equal-total-tokens", targets=targets, parent=parent, data=ranges))


def test_the_hours_of_all_runs_include_the_teacher(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    train = {**distilled_recipe(CACHE).train.model_dump(), "precision": "bf16", "tokens": 10**15}
    recipe = distilled_recipe(CACHE, train=train, seeds=[1, 2])
    plan = dry_run(recipe)
    tokens = plan.arms[0].arm.tokens
    forward = PARENT.flops_per_token(sequence_length=32, training=False)
    assert teacher_hours(plan) == pytest.approx(gpu_hours(tokens * forward, "bf16"))
    show_series(recipe, tmp_path / "run", "here")
    both = 2 * (plan_hours(plan) + teacher_hours(plan))
    assert f"GPU-hours of all runs: {both:,.0f}" in capsys.readouterr().out
    assert teacher_hours(dry_run(distilled_recipe({}))) == teacher_hours(dry_run(distilled_recipe(None))) == 0


def test_caches_leave_the_identity_of_other_runs_alone():
    """A run's result depends on which tokens are kept, not on the ranks that the teacher ran on."""
    assert not {"cache", "rest"} & set(distilled_recipe({}).train.model_dump()["distill"])
    layout = {"cache": {"top_k": 16, "layout": {"tensor_parallel": 2}}}
    assert distilled_recipe(CACHE).train.identity == distilled_recipe(layout).train.identity
    assert distilled_recipe(CACHE).train.identity != distilled_recipe({"cache": {"top_k": 17}}).train.identity
    again = parse_recipe(distilled_recipe(CACHE).model_dump(mode="json"), "again")
    assert again.train.distill == distilled_recipe(CACHE).train.distill
    assert distilled_recipe(CACHE).train.distill.kept == 16
    assert distilled_recipe({**CACHE, "top_k": 8}).train.distill.kept == 8


def test_memory_counts_no_teacher_that_is_read_from_disk():
    online, cached = (dry_run(distilled_recipe(how)).targets[0].largest.memory for how in ({}, CACHE))
    assert cached.teacher == 0 < online.teacher


_FILES = {"train": ["1", "a", "2", "b"], "validation": "v", "calibration": "c", "test": "t"}


@pytest.mark.parametrize(
    ("distill", "changes", "message"),
    [
        ({**CACHE, "top_k": 17}, {}, "top_k is 17, but cache.top_k keeps only 16"),
        ({**CACHE, "embedding_weight": 1}, {}, "a cache has the teacher's log-probabilities, not its hidden states"),
        ({**CACHE, "rest": "class", "temperature": 2}, {}, "rest: class needs temperature 1"),
        ({"rest": "class"}, {}, "rest says what becomes of tokens that top_k leaves out"),
        ({"cache": {"top_k": 16, "layout": {"tensor_parallel": 3}}}, {}, "The teacher must fit on the ranks of train"),
        (CACHE, {"data": {"token_files": _FILES}}, "needs a single training file"),
        (CACHE, {"target": {"stages": 2}}, "targets.depth.stages: training between rounds of pruning begins before"),
        (CACHE, {"layout": {"context_parallel": 2}}, "does not support context_parallel 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_cached_is_refused(distill: Any, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        dry_run(distilled_recipe(distill, **changes))


def test_a_teacher_need_not_fit_on_the_ranks_of_arms_that_read_its_answers():
    """Four layers do not split into three pipeline stages, but a student of three does."""
    arm = {"target": {"layers": 3}, "layout": {"pipeline_parallel": 3}}
    with pytest.raises(UserError, match="The teacher must fit on its student's ranks"):
        dry_run(distilled_recipe({}, **arm))
    assert dry_run(distilled_recipe({"cache": {"top_k": 16, "layout": {}}}, **arm)).arms


def test_the_dry_run_says_how_large_a_cache_is_and_what_it_saves(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    show_series(distilled_recipe(CACHE), tmp_path / "run", "here")
    out = capsys.readouterr().out
    each = 16 * 4 + 2
    assert f"the 16 most likely tokens in fp16, {each} bytes per token" in out
    assert f"{4 * 128 / each:.0f} times less than fp32 logits), {4 * PER_STEP * each / 1e3:.3g} kB in all" in out
    assert "66 GB for each billion tokens" in out
    assert "the teacher reads 1,024 tokens once instead of 2,048 in its arms" in out
    assert "charged 0.5 of its forward pass" in out
    assert "teach/1" in out
    assert "from a cache" in out
    assert "!" not in out
    show_series(distilled_recipe({**CACHE, "arms": ["random"]}), tmp_path / "run", "here")
    assert "a cache saves work only if they do" in " ".join(capsys.readouterr().out.split())


def test_a_full_disk_is_said_before_it_is_full(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert disk_warning(free / 2, tmp_path / "not" / "there") is None
    warning = disk_warning(free * 4, tmp_path / "not" / "there")
    assert warning is not None
    assert str(tmp_path / "not" / "there") in warning


def test_fifty_billion_tokens_of_llama_3():
    assert bytes_per_token(128_256, 32, "fp16") == 32 * (4 + 2) + 2
    content = CacheContent("t", "k", "d", 1, 8192, 0, int(50e9) // 8192, 128_256, 32)
    assert content.tokens * content.bytes_per_token == pytest.approx(9.7e12, rel=0.01)
