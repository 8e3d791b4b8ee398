"""Advice on cases whose answer can be read off the published numbers, or off runs made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.reporting.published import published
from nemo_pvs.reporting.results import ParentResult, Results
from nemo_pvs.scaling.advise import advise
from nemo_pvs.scaling.evidence import (
    Question,
    granularity_of,
    own_evidence,
    packaged_runs,
    published_evidence,
    runs_in,
    written,
)

from ..reporting.conftest import PARENT, TOKENS, make_arm

B = 1e9
PAPER = Question(4 * B, 50 * B, 8 * B)
DEPTH = PARENT.replace(layers=2)


def _own(pruned: float, scratch: float, *, scratch_tokens: int = TOKENS) -> Results:
    """Return a run whose pruned depth arm cost its training tokens and as many again for a parent."""
    arms = [
        make_arm("depth", pruned=True, losses=[4.0, 3.0, pruned], shape=DEPTH),
        make_arm("depth", pruned=False, losses=[6.9, 4.0, scratch], shape=DEPTH),
    ]
    arms[0].ledger = Ledger()
    arms[0].ledger.charge("parent pretraining", TOKENS, PARENT, 64, training=True)
    arms[0].ledger.charge("training", TOKENS, DEPTH, 64, training=True)
    arms[1].ledger = Ledger()
    arms[1].ledger.charge("training", scratch_tokens, DEPTH, 64, training=True)
    parent = ParentResult("tiny parent", PARENT, validation_loss=2.4)
    return Results("Mine", "tiny", {}, "2026-06-12T10:00:00+00:00", {}, {}, parent, arms)


TINY = Question(DEPTH.parameters, TOKENS, PARENT.parameters)


def test_a_run_of_the_package_is_named_as_such_and_applies_at_its_scale() -> None:
    runs = [_own(2.5, 2.9), _own(2.5, 2.9, scratch_tokens=2 * TOKENS)]
    asked = dataclasses.replace(TINY, parent_tokens=TOKENS)
    training, total = own_evidence(asked, runs, packaged=True)
    assert (training.own, training.published, training.source) == (False, False, "nemo_pvs's own run 'Mine' (tiny)")
    assert training.reaches
    assert total.reaches
    assert not own_evidence(PAPER, runs, packaged=True)[0].reaches
    # A parent of far more tokens is another question where it is charged.
    training, total = own_evidence(dataclasses.replace(asked, parent_tokens=9 * TOKENS), runs, packaged=True)
    assert training.reaches
    assert "parent tokens" in total.out_of_reach


def _of_recipe(name: str, *, targets: tuple[str, ...] = ("depth",), rate: float = 1e-3, **train: object) -> Results:
    """Return ``_own`` as a recipe with these targets gave it."""
    recipe = {
        "name": name,
        "parent": {"source": "big"},
        "targets": {target: {"method": "minitron-depth", "layers": 2, "distill": True} for target in targets},
        "train": {"seed": 1, "tokens": TOKENS, "learning_rate": {"pruned": rate, "random": 1e-2}, **train},
    }
    return dataclasses.replace(_own(2.5, 2.9, scratch_tokens=2 * TOKENS), recipe=recipe, recipe_name=name)


def test_arms_that_two_runs_share_are_one_comparison() -> None:
    first = _of_recipe("quick")
    again = _of_recipe("full", targets=("depth", "width"), tokens=2 * TOKENS, checkpoints=9, distill={"top_k": 8})
    asked = dataclasses.replace(TINY, parent_tokens=TOKENS)
    assert own_evidence(asked, [first, again]) == own_evidence(asked, [first])
    assert len(own_evidence(asked, [first])) == 1
    for other in (_of_recipe("other", rate=2e-3), _of_recipe("other", weight_decay=0.0)):
        assert len(own_evidence(asked, [first, other])) == 2
    packaged = packaged_runs()
    alone = [one for run in packaged for one in own_evidence(TINY, [run])]
    assert own_evidence(TINY, [*packaged, *packaged]) == own_evidence(TINY, packaged) == alone


def test_of_two_arms_from_scratch_with_nearly_equal_total_tokens_the_nearer_counts() -> None:
    run = _own(2.5, 2.9, scratch_tokens=2 * TOKENS)
    run.arms.append(dataclasses.replace(run.arms[1], name="further", validation=run.arms[0].validation))
    run.arms[-1].ledger = Ledger()
    run.arms[-1].ledger.charge("training", 2 * TOKENS + TOKENS // 20, DEPTH, 64, training=True)
    asked = dataclasses.replace(TINY, parent_tokens=TOKENS)
    totals = [one.advantage for one in own_evidence(asked, [run]) if one.setting == "equal total tokens"]
    assert totals == [pytest.approx(0.4)]


def test_evidence_of_distilled_models_is_named_as_such() -> None:
    run = _own(2.5, 2.9)
    assert "teacher" not in own_evidence(TINY, [run])[0].statement
    for arm in run.arms:
        arm.ledger.charge("teacher", TOKENS, PARENT, 64, training=False)
    assert own_evidence(TINY, [run])[0].statement.endswith(" tokens, with a teacher")


def test_the_papers_own_case_with_the_parent_in_hand() -> None:
    (verdict,) = advise(PAPER)
    assert (verdict.choice, verdict.sureness, verdict.granularity) == ("prune", "likely", "width")
    advantages = {(one.method, one.unit): one.advantage for one in verdict.evidence}
    assert advantages == {
        ("minitron-depth", "nats"): pytest.approx(2.64 - 2.54),
        ("minitron-width", "nats"): pytest.approx(2.70 - 2.47),
        ("minitron-depth", "points"): 3.7,
    }
    assert all("arXiv 2606.14150" in one.source for one in verdict.evidence)


def test_the_papers_own_case_with_the_parent_charged() -> None:
    _, verdict = advise(dataclasses.replace(PAPER, parent_tokens=200 * B))
    assert verdict.setting == "equal total tokens"
    assert (verdict.choice, verdict.sureness, verdict.granularity) == ("either", "tentative", None)
    assert "depth: scratch is better" in verdict.summary
    depth = [one.advantage for one in verdict.evidence if one.granularity == "depth"]
    assert depth == [pytest.approx(2.49 - 2.54), pytest.approx(64.4 - 66.2)]


def test_at_the_highest_ratio_the_advantage_has_vanished() -> None:
    (verdict,) = advise(Question(1.5 * B, 50 * B, 8 * B))
    assert (verdict.choice, verdict.sureness) == ("either", "tentative")
    assert [one.advantage for one in verdict.evidence] == [-0.2]


def test_a_parent_beyond_the_evidence_is_said() -> None:
    in_hand, charged = advise(dataclasses.replace(PAPER, parent_tokens=15e12))
    assert in_hand.choice == "prune"
    assert "comparable or slightly better" in in_hand.summary
    assert (charged.choice, charged.sureness) == ("unknown", "unknown")
    assert "does not cover" in charged.summary
    assert all(one.out_of_reach for one in charged.evidence)
    assert any("15T parent tokens, compared with 210B" in one.out_of_reach for one in charged.evidence)


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (Question(100e6, 50 * B, 200e6), "100M parameters, compared with 4.54B"),
        (Question(4 * B, 1 * B, 8 * B), "1B tokens, compared with 10.5B to 524B"),
        (Question(4 * B, 2000 * B, 8 * B), "2T tokens, compared with 10.5B to 524B"),
        (Question(4 * B, 50 * B, 5 * B), "ratio 0.20, compared with 0.50"),
    ],
)
def test_a_question_beyond_the_evidence_is_not_answered(question: Question, reason: str) -> None:
    (verdict,) = advise(question)
    assert verdict.choice == "unknown"
    assert any(reason in one.out_of_reach for one in verdict.evidence)


def test_between_two_published_points_the_loss_is_interpolated() -> None:
    halfway = (10 * 30) ** 0.5 * published().curves[0].points[0].tokens / 10  # in the logarithm of tokens
    found = published_evidence(Question(4 * B, halfway, 8 * B), published())
    depth = next(one for one in found if one.method == "minitron-depth")
    assert depth.advantage == pytest.approx((3.09 + 2.81) / 2 - (2.70 + 2.59) / 2)
    outside = published_evidence(Question(4 * B, 2000 * B, 8 * B), published())
    assert outside[0].advantage == pytest.approx(2.47 - 2.43)  # the last point, and not a line drawn on


def test_own_runs_decide_alone() -> None:
    near = dataclasses.replace(_own(2.5, 2.9), title="A 100M run")
    (verdict,) = advise(TINY, [near])
    assert (verdict.choice, verdict.sureness, verdict.granularity) == ("prune", "likely", "depth")
    (evidence,) = verdict.evidence
    assert (evidence.own, evidence.advantage) == (True, pytest.approx(0.4))
    assert "A 100M run" in evidence.source


@pytest.mark.parametrize(("scratch", "choice"), [(2.3, "scratch"), (2.51, "either"), (2.9, "prune")])
def test_own_runs_can_say_anything(scratch: float, choice: str) -> None:
    assert advise(TINY, [_own(2.5, scratch)])[0].choice == choice


def test_own_runs_that_contradict_each_other_are_tentative() -> None:
    (verdict,) = advise(TINY, [_own(2.5, 2.9), _own(2.5, 2.8), _own(2.5, 2.3)])
    assert (verdict.choice, verdict.sureness) == ("prune", "tentative")


def test_the_seeds_of_an_own_run_are_one_comparison(tmp_path: Path) -> None:
    for seed, scratch in ((1, 2.6), (2, 2.6), (3, 2.3)):
        run = dataclasses.replace(_own(2.5, scratch), recipe={"train": {"seed": seed}})
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        run.save(folder / "results.json")
    for folders in ([str(tmp_path)], [f"{tmp_path}/seed-{seed}" for seed in (1, 2, 3)]):
        (verdict,) = advise(TINY, runs_in(folders))
        assert [one.advantage for one in verdict.evidence] == [pytest.approx(0.0)]
        assert verdict.choice == "either"


def test_the_whole_parent_trained_further_is_no_pruned_model() -> None:
    run = _own(2.5, 2.9)
    for arm in run.arms:
        arm.shape, arm.method = PARENT, "dense"
    assert own_evidence(TINY, [run]) == []


def test_equal_total_tokens_count_the_teacher_of_scratch() -> None:
    """Scratch with a teacher pays for the parent, too: on as many training tokens it took as many in total."""
    asked = dataclasses.replace(TINY, parent_tokens=TOKENS)
    for scratch_tokens, settings in ((TOKENS, 2), (3 * TOKENS, 0)):
        run = _own(2.5, 2.4, scratch_tokens=scratch_tokens)
        run.arms[0].ledger.charge("teacher", TOKENS, PARENT, 64, training=False)
        run.arms[1].ledger.charge("parent pretraining", TOKENS, PARENT, 64, training=True, note="of the teacher")
        run.arms[1].ledger.charge("teacher", scratch_tokens, PARENT, 64, training=False)
        found = [one.setting for one in own_evidence(asked, [run])]
        assert found == ["equal training tokens", "equal total tokens"][:settings]


def test_an_own_run_at_equal_total_tokens_answers_for_the_parents_cost() -> None:
    question = dataclasses.replace(TINY, parent_tokens=TOKENS)
    assert advise(question, [_own(2.5, 2.4)])[1].choice == "unknown"  # scratch was not trained that long
    _, verdict = advise(question, [_own(2.5, 2.4, scratch_tokens=2 * TOKENS)])
    assert (verdict.choice, verdict.granularity) == ("scratch", None)
    assert [one.advantage for one in verdict.evidence] == [pytest.approx(-0.1)]


def test_an_own_run_of_another_size_does_not_reach() -> None:
    (verdict,) = advise(dataclasses.replace(TINY, parameters=TINY.parameters * 3, parent_parameters=1e7), [_own(2, 3)])
    assert verdict.choice == "unknown"
    assert "parameters, compared with" in verdict.evidence[0].out_of_reach


def test_a_run_that_diverged_is_no_evidence() -> None:
    (verdict,) = advise(TINY, [_own(float("nan"), 2.5)])
    assert not any(one.own for one in verdict.evidence)


def test_the_granularity_of_an_arm() -> None:
    results = _own(2.5, 2.9)
    arm, parent = results.arms[0], results.parent
    assert parent is not None
    narrow = PARENT.replace(ffn=8)
    assert granularity_of(arm, parent) == "depth"
    assert granularity_of(dataclasses.replace(arm, shape=narrow), parent) == "width"
    assert granularity_of(dataclasses.replace(arm, shape=narrow.replace(layers=2)), parent) == "width"
    assert granularity_of(dataclasses.replace(arm, shape=PARENT, masked_parameters=5), parent) == "sparse"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(4 * B, 50 * B, 4 * B), "4B parameters cannot be pruned from one of 4B"),
        (Question(-1, 50 * B, 4 * B), "-1 parameters make no sense"),
        (Question(4 * B, 0, 8 * B), "0 training tokens make no sense"),
    ],
)
def test_a_question_without_sense_is_refused(question: Question, message: str) -> None:
    with pytest.raises(UserError, match=message):
        advise(question)


def test_counts_are_written_for_people() -> None:
    counts = (4.54e9, 15e12, 209_715_200_000, 135e6, 999_999_999, 512)
    assert [written(count) for count in counts] == ["4.54B", "15T", "210B", "135M", "1B", "512"]
