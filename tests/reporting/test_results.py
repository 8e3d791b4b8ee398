from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.reporting.results import ArmResult, Point, Results
from nemo_pvs.system.files import write_json

from .conftest import TOKENS


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.arms[1].test_perplexity_before = None
    results.arms[1].parallel = {}
    results.arms[2].masked_parameters = 17
    results.parent.test_perplexity = None
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


def test_a_loss_that_is_not_finite_survives_in_valid_json(results: Results, tmp_path: Path) -> None:
    results.arms[0].validation[-1].loss = math.inf
    results.arms[1].validation[-1].loss = math.nan
    results.save(tmp_path / "results.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    read = Results.load(tmp_path / "results.json")
    assert read.arms[0].validation_loss == math.inf
    assert read.arms[1].validation_loss is not None
    assert math.isnan(read.arms[1].validation_loss)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data["arms"][1].pop("shape"), r"arms\.1\.shape: Field required"),
        (lambda data: data["arms"][0].update(initialisation="warm"), r"arms\.0\.initialisation"),
        (lambda data: data["arms"][0]["validation"][2].update(loss="low"), r"arms\.0\.validation\.2\.loss"),
        (lambda data: data["arms"][0]["ledger"][0].update(activity="holiday"), r"ledger\.charges\.0\.activity"),
        (lambda data: data["arms"][0]["shape"].update(kv_groups=3), "8 query heads cannot be shared by 3 KV groups"),
        (lambda data: data.pop("arms"), "not those of a finished run"),
        (lambda data: data["arms"][0].pop("ledger"), "not those of a finished run"),
    ],
)
def test_damaged_results_are_refused_with_the_place(
    results: Results, tmp_path: Path, damage: Any, message: str
) -> None:
    data = results.to_json()
    damage(data)
    write_json(tmp_path / "results.json", data)
    with pytest.raises(UserError, match=message):
        Results.load(tmp_path / "results.json")


def test_a_ledger_with_fewer_tokens_than_the_curve_is_refused(results: Results, tmp_path: Path) -> None:
    results.arms[1].ledger = Ledger()
    results.arms[1].ledger.charge("training", TOKENS - 1, results.arms[1].shape, 64, training=True)
    results.save(tmp_path / "results.json")
    with pytest.raises(UserError, match=r"depth, scratch does not add up: it charges 40,959 training .* after 40,960"):
        Results.load(tmp_path / "results.json")


def test_the_gap_is_scratch_minus_pruned_at_the_end(results: Results) -> None:
    gaps = [results.gap(arm) for arm in results.arms]
    assert gaps == [pytest.approx(0.10), None, pytest.approx(-0.20), None]


def test_the_gap_is_taken_at_equal_tokens_only(results: Results) -> None:
    pruned = results.arms[0]
    pruned.validation[-1].tokens += 1  # the last points no longer match, those before do: 2.75 - 2.625
    assert results.gap(pruned) == 0.125
    pruned.validation = pruned.validation[:1]  # nothing in common but the start
    assert results.gap(pruned) is None
    pruned.validation = []
    assert results.gap(pruned) is None


def test_the_last_measurement_at_a_token_count_counts(results: Results) -> None:
    results.arms[0].validation.append(Point(4, TOKENS, 2.0))  # measured again when the run ended
    assert results.gap(results.arms[0]) == pytest.approx(0.64)


def _random(results: Results, arm: ArmResult, steps: int) -> None:
    """Add an arm from scratch of the shape of ``arm``, of so many steps of a tenth of its tokens."""
    ledger, size = Ledger(), TOKENS // 10
    ledger.charge("training", steps * size, arm.shape, 64, training=True, tokens_per_step=size)
    scratch = dataclasses.replace(results.arms[1], name=f"scratch {steps}", target=arm.target, ledger=ledger)
    scratch.validation = [Point(steps, steps * size, 2.5 + 1 / steps)]
    results.arms.append(scratch)


def test_scratch_is_the_arm_of_the_same_cost(results: Results) -> None:
    pruned = results.arms[2]
    results.arms.remove(results.arms[3])
    for steps in (5, 20, 10, 30):  # the order of a recipe's budgets says nothing
        _random(results, pruned, steps)
    assert results.scratch_of(pruned).name == "scratch 10"
    assert results.gap(pruned) == pytest.approx(2.6 - 2.7)
    pruned.ledger.charges = [charge for charge in pruned.ledger.charges if charge.activity == "training"]
    pruned.ledger.charge("parent pretraining", 2 * TOKENS, pruned.shape, 64, training=True)
    found = [(one.setting, one.scratch.name, one.gap) for one in results.comparisons(pruned)]
    assert found == [
        ("equal-training-tokens", "scratch 10", pytest.approx(2.6 - 2.7)),
        ("equal-total-tokens", "scratch 30", pytest.approx(2.5 + 1 / 30 - 2.7)),
    ]
    # A parent twice as costly: equal in tokens and in FLOPs are two arms now.
    pruned.ledger.charges[-1] = dataclasses.replace(pruned.ledger.charges[-1], tokens=TOKENS)
    assert [(one.setting, one.scratch.name) for one in results.comparisons(pruned)][1:] == [
        ("equal-total-tokens", "scratch 20"),
        ("equal-total-flops", "scratch 30"),
    ]


def test_equal_is_to_one_step(results: Results) -> None:
    pruned = results.arms[2]
    results.arms.remove(results.arms[3])
    _random(results, pruned, 11)
    assert results.scratch_of(pruned).name == "scratch 11"
    pruned.ledger.charge("training", 12 * TOKENS // 10 - TOKENS + 1, pruned.shape, 64, training=True)
    assert results.scratch_of(pruned) is None
    assert results.comparisons(pruned) == []


def test_arms_are_compared_within_their_target(results: Results) -> None:
    assert list(results.targets) == ["depth", "width"]
    assert results.scratch_of(results.arms[2]) is results.arms[3]
    assert results.scratch_of(results.arms[3]) is None
    results.arms.pop()
    assert results.scratch_of(results.arms[2]) is None
    assert results.gap(results.arms[2]) is None
