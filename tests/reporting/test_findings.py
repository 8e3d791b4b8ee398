"""The paper's findings judged on a grid with three seeds, whose gaps are known."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from nemo_pvs.api.report import report
from nemo_pvs.reporting import html
from nemo_pvs.reporting.compare.budgets import budget_rows
from nemo_pvs.reporting.compare.compare import compare
from nemo_pvs.reporting.compare.estimates import EQUAL_TOTAL, final_loss, gap, gap_by_seed, parent_loss
from nemo_pvs.reporting.compare.removed import granularity
from nemo_pvs.reporting.compare.runs import Run, SideBySide
from nemo_pvs.reporting.compare.verdicts import PaperFinding
from nemo_pvs.reporting.data import equal_terms, report_data
from nemo_pvs.reporting.figures.gap import gap_against_tokens, gap_series
from nemo_pvs.reporting.figures.terms import compared_arms, terms_figure
from nemo_pvs.reporting.results import ArmResult, Results
from nemo_pvs.reporting.tables.budgets import budget_cells
from nemo_pvs.reporting.tables.results import outcome

from .grid import BUDGETS, GAPS, OF_TOTAL, OF_TOTAL_GAPS, STEP, TARGETS, grid_runs

GOLDEN = Path(__file__).parent / "golden_grid.json"
HALF_WIDTH = 4.302653 * 0.01 / 3**0.5
"""Of -0.01, 0 and 0.01: t with 2 degrees of freedom times the standard error."""


def _finding(runs: SideBySide, name: str) -> PaperFinding:
    return next(finding for finding in runs.findings if finding.name == name)


def _arm(runs: SideBySide, target: str, start: str, tokens: int) -> ArmResult:
    return next(arm for arm in runs.results.arms if arm.name == f"{target}, {start}, {tokens}")


def _without(runs: list[Run], *names: str) -> list[Run]:
    for run in runs:
        run.results.arms = [arm for arm in run.results.arms if not arm.name.startswith(names)]
    return runs


def test_gaps_are_paired_by_seed() -> None:
    """What a seed adds to both arms, here up to 0.3 nats, is no part of the interval."""
    runs = compare(grid_runs())
    for target, gaps in GAPS.items():
        for budget, expected in zip(BUDGETS, gaps, strict=True):
            found = gap(runs, _arm(runs, target, "pruned", budget))
            assert found is not None
            assert (found.mean, found.half_width) == pytest.approx((expected, HALF_WIDTH), abs=1e-6)
        found = gap(runs, _arm(runs, target, "pruned", BUDGETS[-1]), EQUAL_TOTAL)
        assert found is not None
        assert (found.mean, found.half_width) == pytest.approx((OF_TOTAL_GAPS[target], HALF_WIDTH), abs=1e-6)


def test_an_arm_whose_budget_differs_between_seeds_has_the_mean_of_its_last_losses() -> None:
    """A budget in FLOPs does, where scores decide each seed's shape."""
    seeds = grid_runs()
    name = f"depth-50, random, {OF_TOTAL}"
    for run in seeds:
        arm = next(arm for arm in run.results.arms if arm.name == name)
        arm.validation[-1].tokens += run.seed * STEP
    runs = compare(seeds)
    arm, pruned = (_arm(runs, "depth-50", *of) for of in (("random", OF_TOTAL), ("pruned", BUDGETS[-1])))
    over_seeds = final_loss(runs, arm)
    assert over_seeds is not None
    assert [point.tokens for point in arm.validation] == [0, OF_TOTAL + STEP]
    assert arm.validation_loss == pytest.approx(over_seeds.mean)
    assert runs.loss_deviations(arm)[OF_TOTAL + STEP] == over_seeds.deviation
    assert runs.results.gap(pruned, EQUAL_TOTAL) == pytest.approx(OF_TOTAL_GAPS["depth-50"])


def test_a_parent_for_each_seed_is_shown_by_its_mean() -> None:
    runs = compare(grid_runs())
    losses = [4.1, 3.6, 3.9]
    assert runs.results.parent is not None
    assert runs.results.parent.validation_loss == pytest.approx(sum(losses) / 3)
    found = parent_loss(runs)
    assert found is not None
    assert found.deviation == pytest.approx(statistics.stdev(losses))
    shared = grid_runs()
    for run in shared:
        run.results.hashes["parent weights"] = "1"
    found = parent_loss(compare(shared))
    assert found is not None
    assert (found.mean, found.count) == (4.1, 1), "one parent has no spread"


def test_arms_of_different_runs_are_paired_by_seed_too() -> None:
    """Pruned and scratch as two recipes, in another order of seeds; a seed that only one has is not used."""
    expected = gap(compare(grid_runs(1, 2)), compare(grid_runs(1, 2)).results.arms[0])
    pruned, scratch = grid_runs(1, 2), grid_runs(3, 2, 1)
    for run in pruned:
        run.results.arms = [arm for arm in run.results.arms if arm.initialisation == "pruned"]
    for run in scratch:
        run.results.recipe["note"] = "another recipe"
        run.results.arms = [arm for arm in run.results.arms if arm.initialisation == "random"]
    runs = compare([*pruned, *scratch], force=True)
    found = gap(runs, _arm(runs, "depth-50", "pruned", BUDGETS[0]))
    assert found is not None
    assert expected is not None
    assert (found.mean, found.half_width, found.count) == pytest.approx((expected.mean, expected.half_width, 2))
    assert found.mean == pytest.approx(1.7 - 0.005)


def test_every_finding_is_judged_by_its_intervals() -> None:
    runs = compare(grid_runs())
    judged = {finding.name: finding.judgement for finding in runs.findings}
    assert judged == {
        **dict.fromkeys(("1a", "1b", "1c", "2a", "2b"), "holds"),
        "2c": "undecided",  # width: +0.005 ± 0.025
    }
    assert all(finding.source.startswith("arXiv 2606.14150, finding ") for finding in runs.findings)
    assert [len(finding.evidence) for finding in runs.findings] == [15, 5, 3, 2, 2, 1]
    assert _finding(runs, "2b").reason == (
        "Of 2 comparisons, in nats per token, 2 agree (depth-50, pruned, 1638400 −0.200\u00a0±\u00a00.025; "
        "depth-75, pruned, 1638400 −0.300\u00a0±\u00a00.025)."
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({("depth-50", BUDGETS[0]): -2.0}, {"1a": "fails", "1b": "fails", "1c": "fails"}),
        ({("depth-50", OF_TOTAL): 0.5}, {"2b": "fails"}),
        ({("depth-50", OF_TOTAL): 0.2}, {"2b": "undecided"}),
        ({("width-50", OF_TOTAL): -0.1}, {"2c": "holds"}),
        ({("width-50", OF_TOTAL): 0.1}, {"2c": "fails"}),
        ({("wanda-2-4", OF_TOTAL): -0.08}, {"2a": "undecided"}),
        ({("wanda-2-4", OF_TOTAL): -0.11}, {"2a": "undecided"}),  # -0.030: ± 0.025 alone, but ± 0.036 as one of two
        ({("wanda-2-4", OF_TOTAL): -0.2}, {"2a": "fails"}),
    ],
)
def test_a_judgement_turns_with_the_numbers(change: dict[tuple[str, int], float], expected: dict[str, str]) -> None:
    """The loss of one arm from scratch is changed by so much with every seed."""
    runs = grid_runs()
    for run in runs:
        for arm in run.results.arms:
            if arm.initialisation == "random":
                arm.validation[-1].loss += change.get((arm.target, arm.validation[-1].tokens), 0.0)
    judged = {finding.name: finding.judgement for finding in compare(runs).findings}
    assert judged == {**dict.fromkeys(("1a", "1b", "1c", "2a", "2b"), "holds"), "2c": "undecided", **expected}


def test_one_of_several_comparisons_decides_only_if_its_interval_holds_for_all_of_them() -> None:
    runs = grid_runs()
    for run in runs:
        for arm in run.results.arms:
            if arm.target == "wanda-2-4" and arm.validation[-1].tokens == OF_TOTAL:
                arm.validation[-1].loss -= 0.11
    assert _finding(compare(runs), "2a").reason == (
        "Of 2 comparisons, in nats per token, 1 agrees (wanda-50, pruned, 1638400 +0.100\u00a0±\u00a00.025) and 1 is "
        "open (wanda-2-4, pruned, 1638400 −0.030\u00a0±\u00a00.025). Zero is outside the interval of 1 of the open "
        "ones, but not once it is widened for 2 comparisons together."
    )


def test_one_seed_decides_nothing() -> None:
    for finding in compare(grid_runs(1)).findings:
        assert finding.judgement == "undecided"
        assert "One seed has no interval; report runs with at least two seeds." in finding.reason


def test_a_seed_that_diverged_is_not_one_seed() -> None:
    runs = grid_runs()
    arm = next(arm for arm in runs[2].results.arms if arm.name == f"depth-50, random, {OF_TOTAL}")
    arm.validation[-1].loss = math.nan
    finding = _finding(compare(runs), "2b")
    assert finding.judgement == "undecided"
    assert "1 has no interval, as a training diverged." in finding.reason
    only = compare(_without(runs, "depth-75"))
    reason = _finding(only, "2b").reason
    assert "1 has no interval, as a training diverged." in reason
    assert "One seed" not in reason


def test_what_is_missing_is_named_and_not_filled_in() -> None:
    """A claim about all does not hold while one is missing, and still fails if another contradicts it."""
    runs = compare(_without(grid_runs(), "depth-75, random, 983040", "wanda-2-4, pruned"))
    first = _finding(runs, "1a")
    assert (first.judgement, len(first.evidence)) == ("undecided", 11)
    assert first.missing == (
        "the arm from the pruned parent on wanda-2-4",
        "the arm from random weights with the training tokens of “depth-75, pruned, 983040”",
    )
    assert first.reason.endswith(f"Missing: {'; '.join(first.missing)}.")
    assert _finding(runs, "2a").missing == ("the arm from the pruned parent on wanda-2-4",)
    assert _finding(runs, "2a").judgement == "undecided"
    assert _finding(runs, "2b").judgement == "holds", "wanda is no part of it"

    runs = compare(_without(grid_runs(), "depth-50, random, 8192000", "depth-75, random, 8192000"))
    finding = _finding(runs, "2b")
    assert (finding.judgement, finding.evidence) == ("undecided", ())
    assert finding.missing[0] == "an arm from random weights with the total tokens of a pruned one on depth-50"

    runs = compare(_without(grid_runs(), "wanda"))
    for run in runs.runs:
        run.results.recipe["targets"] = {}
    finding = _finding(compare(runs.runs), "2a")
    assert finding.missing == (
        "a model with weights set to zero (unstructured or N:M), pruned and from random weights",
    )


def test_a_seed_without_results_is_missing_from_the_report_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of three seeds that was killed in the third; without its recipe the folders that exist say so."""
    monkeypatch.setattr(html, "write_files", lambda *_, **__: None)
    for run in grid_runs(1, 2):
        (tmp_path / f"seed-{run.seed}").mkdir()
        run.results.save(tmp_path / f"seed-{run.seed}" / "results.json")
    assert _finding(report(tmp_path), "1a").judgement == "holds"
    (tmp_path / "recipe.yaml").write_text("seeds: [1, 2, 3]")
    finding = _finding(report(tmp_path), "1a")
    assert (finding.judgement, finding.missing) == ("undecided", (f"all of {tmp_path}/seed-3, not trained yet",))
    (tmp_path / "recipe.yaml").unlink()
    (tmp_path / "seed-3").mkdir()
    assert _finding(report(tmp_path), "1a").missing == finding.missing


def test_one_budget_says_nothing_of_more_tokens() -> None:
    runs = grid_runs()
    for run in runs:
        run.results.arms = [arm for arm in run.results.arms if arm.validation[-1].tokens == BUDGETS[0]]
    finding = _finding(compare(runs), "1b")
    assert (finding.judgement, finding.evidence) == ("undecided", ())
    assert finding.missing == (
        "gaps at two budgets of training tokens on depth-50, depth-75, width-50, wanda-50 and wanda-2-4",
    )


def test_a_run_without_a_pruned_model_has_no_findings(results: Results) -> None:
    results.arms = [arm for arm in results.arms if arm.initialisation == "random"]
    assert compare([Run("runs/demo", results)]).findings == ()


def test_granularity_follows_from_the_shapes(results: Results) -> None:
    runs = compare(grid_runs())
    found = {arm.target: granularity(runs, arm) for arm in runs.results.arms}
    assert found == {
        **{"depth-50": "depth", "depth-75": "depth", "width-50": "width"},
        **{"wanda-50": "unstructured", "wanda-2-4": "N:M"},
    }
    arm = results.arms[0]
    arm.shape = arm.shape.replace(ffn=64)
    one = compare([Run("runs/demo", results)])
    assert granularity(one, one.results.arms[0]) == "depth and width"
    arm.shape = results.parent.shape
    one = compare([Run("runs/demo", results)])
    assert granularity(one, one.results.arms[0]) is None


def test_equal_total_tokens_count_as_the_paper_does_if_no_other_arm_fits() -> None:
    """Calibration took 8 steps; an arm from scratch that has those too is preferred."""
    runs = compare(grid_runs())
    arm = _arm(runs, "depth-50", "pruned", BUDGETS[-1])
    assert runs.results.scratch_of(arm, EQUAL_TOTAL) is _arm(runs, "depth-50", "random", OF_TOTAL)
    assert runs.results.leaves_out_calibration(arm)
    assert runs.results.scratch_of(_arm(runs, "depth-50", "pruned", BUDGETS[0]), EQUAL_TOTAL) is None
    exact = _arm(runs, "depth-50", "random", OF_TOTAL)
    arm.ledger.charges = [charge for charge in arm.ledger.charges if charge.activity != "calibration"]
    assert runs.results.scratch_of(arm, EQUAL_TOTAL) is exact
    assert not runs.results.leaves_out_calibration(arm)


def test_a_teacher_makes_equal_training_tokens_equal_total_tokens() -> None:
    """Its pretraining is charged to both arms; only calibration is charged to one."""
    runs = compare(grid_runs())
    arm, scratch = (_arm(runs, "depth-50", start, BUDGETS[-1]) for start in ("pruned", "random"))
    assert runs.results.scratch_of(arm, EQUAL_TOTAL) is not scratch
    (pretraining,) = (charge for charge in arm.ledger.charges if charge.activity == "parent pretraining")
    scratch.ledger.charges.append(pretraining)
    runs.results.arms = [arm, scratch]
    assert runs.results.scratch_of(arm, EQUAL_TOTAL) is scratch
    assert runs.results.leaves_out_calibration(arm)


def test_arms_with_a_teacher_do_not_decide_what_the_paper_found_without_one() -> None:
    """Where both are charged the parent, equal total tokens are equal training tokens."""
    runs = grid_runs()
    before = _finding(compare(runs), "2b").reason
    assert "Of 2 comparisons" in before
    for run in runs:
        arms = [arm for arm in run.results.arms if arm.target == "depth-75"]
        (pretraining, *_) = (c for arm in arms for c in arm.ledger.charges if c.activity == "parent pretraining")
        for arm in arms:
            if arm.initialisation == "random":
                arm.ledger.charges.append(pretraining)
    reason = _finding(compare(runs), "2b").reason
    assert "Of 1 comparison" in reason
    assert "depth-75, pruned" not in reason


def test_equal_terms_have_their_intervals() -> None:
    rows = equal_terms(compare(grid_runs()))
    row = next(row for row in rows if row["scratch"] == "depth-50, random, 8192000")
    assert (row["pruned"], row["setting"]) == ("depth-50, pruned, 1638400", "equal-total-tokens")
    assert (row["gap"], row["gap_deviation"]) == pytest.approx((-0.2, 0.01))
    assert (row["gap_low"], row["gap_high"]) == pytest.approx((-0.2 - HALF_WIDTH, -0.2 + HALF_WIDTH), abs=1e-6)
    assert row["gap_seeds"] == 3


def test_the_table_goes_from_coarse_to_fine_with_the_papers_rows_beside_ours() -> None:
    runs = compare(grid_runs())
    own = budget_rows(runs)
    assert [row.target for row in own] == [
        *["depth-50"] * 3,
        *["depth-75"] * 3,
        *["width-50"] * 3,
        *["wanda-2-4"] * 3,
        *["wanda-50"] * 3,
    ]
    assert budget_cells(own)[2] == [
        *("minitron-depth", "depth-50", "depth", "34.6", "1.64M", "validation loss (nats)"),
        *("5.067", "4.167", "3.967", "+0.900\u00a0±\u00a00.025", "−0.200\u00a0±\u00a00.025"),
    ]
    both = budget_rows(runs, reference=True)
    assert [row for row in both if row.target] == own
    paper = [row for row in both if row.target is None and row.method == "minitron-depth"]
    assert len(paper) == 5 + 1 + 1 + 2  # Figure 1, perplexity, accuracy at equal total and at equal training tokens
    fifty = next(row for row in paper if row.pruned == 2.54)
    assert (fifty.scratch, fifty.scratch_of_total) == (2.64, 2.49)
    assert fifty.gap is not None
    assert fifty.gap_of_total is not None
    assert (fifty.gap.mean, fifty.gap_of_total.mean) == pytest.approx((0.10, -0.05))
    text = next(row for row in paper if "WikiText-2" in row.quantity)
    assert (text.scratch, text.pruned, text.scratch_of_total) == (10.77, 9.41, 9.01)
    assert {row.gap.half_width for row in paper if row.gap} == {None}, "single runs have no interval"


@pytest.mark.slow
def test_the_figures_have_the_points_and_their_bars() -> None:
    runs = compare(grid_runs())
    lines = gap_series(runs)
    assert list(lines) == list(TARGETS)
    assert all([tokens for tokens, _ in line] == list(BUDGETS) for line in lines.values())
    assert [value.mean for _, value in lines["depth-75"]] == pytest.approx(GAPS["depth-75"])
    figures = gap_against_tokens(runs)
    assert len(figures) == 4, "more lines than colours: a panel for each granularity"
    assert "depth, at the end: depth-50 +0.90, depth-75 +0.60" in figures[0]
    assert [arm.name for arm in compared_arms(runs)] == [
        f"{target}, pruned, 1638400" for target in ("depth-50", "depth-75", "width-50", "wanda-2-4", "wanda-50")
    ]
    figure = terms_figure(runs)
    assert "depth-50, pruned, 1638400, equal training tokens +0.90" in figure
    assert "depth-50, pruned, 1638400, equal total tokens −0.20" in figure
    assert figure != terms_figure(compare(grid_runs(1))), "one seed has no bars"
    assert terms_figure(compare(_without(grid_runs(), *(f"{name}, random, 8192000" for name in TARGETS)))) == ""


def test_a_seed_that_lacks_an_arm_is_left_out_of_the_pairs() -> None:
    runs = grid_runs()
    runs[2].results.arms = [arm for arm in runs[2].results.arms if arm.name != "depth-50, random, 327680"]
    both = compare(runs)
    arm = _arm(both, "depth-50", "pruned", BUDGETS[0])
    assert gap_by_seed(both, arm) == pytest.approx({("1", "1"): 1.69, ("2", "2"): 1.70})
    assert "pruning won 15 of 15 comparisons by 0.60 to 1.90 nats" in outcome(both.results, both)


def test_the_report_of_three_seeds_is_the_recorded_one() -> None:
    """To record it again after an intended change: delete the file, run this test twice."""
    data = report_data(compare(grid_runs()), reference=True)
    kept = {key: data[key] for key in ("findings", "equal_terms", "by_budget", "gap_against_tokens", "warnings")}
    plain = json.loads(json.dumps(kept), parse_float=lambda text: round(float(text), 9))
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
        pytest.fail("recorded; run the test again")
    assert plain == json.loads(GOLDEN.read_text())
