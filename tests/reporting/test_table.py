from __future__ import annotations

import copy
import dataclasses
import math
import re

import pytest
from rich.console import Console

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.reporting.compare.compare import compare
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.data import report_data
from nemo_pvs.reporting.results import Results
from nemo_pvs.reporting.tables.results import (
    markdown_table,
    notes_of,
    outcome,
    results_rows,
    results_table,
    total_cost,
)

from .conftest import PARENT, make_arm


def _terminal(results: Results, width: int) -> str:
    console = Console(width=width, file=None, color_system=None)
    with console.capture() as capture:
        console.print(results_table(results, width=width), crop=False)
    return capture.get()


def test_the_headline_names_the_winner_and_the_margin(results: Results) -> None:
    assert outcome(results) == (
        "At equal training tokens, on depth pruning won by 0.10 nats per token, "
        "on width training from scratch won by 0.20 nats per token."
    )


def test_the_headline_claims_nothing_that_was_not_measured(results: Results) -> None:
    results.arms[0].validation[-1].loss = results.arms[1].validation[-1].loss - 0.004
    results.arms[2].validation = []
    assert outcome(results) == (
        "At equal training tokens, on depth pruning and training from scratch were equal to two decimals, "
        "on width pruning was not compared with training from scratch."
    )
    results.arms[0].validation[-1].loss = math.nan
    assert "on depth pruning or training from scratch diverged" in outcome(results)
    results.arms = [results.arms[1]]
    assert outcome(results) == "No pruned model here has a counterpart trained from scratch."


def test_a_narrow_terminal_cuts_no_number(results: Results) -> None:
    """It wraps the lines, as the last column was cut off at 70 columns, and the names were gone at 60."""
    for width in (40, 60, 70, 76):
        text = _terminal(results, width)
        assert text.count(" 45.68") == 4
        assert text.count(" 1,234 ") == 4
        assert all(name in text for name in ("depth,", "width,", "tiny parent"))
        assert "…" not in text


def test_a_loss_that_is_not_finite_takes_no_column_from_the_terminal(results: Results) -> None:
    results.arms[0].validation[-1].loss = math.nan
    text = _terminal(results, 80)
    assert text.count("NaN/∞") == 2, "loss and gap"
    assert text.count("45.68") == 4, "perplexity after training"


def test_a_perplexity_and_its_interval_have_as_many_digits(results: Results) -> None:
    other = copy.deepcopy(results)
    other.recipe["train"]["seed"] = 2
    other.arms[0].test_perplexity_after, other.arms[1].test_perplexity_after = 47.678, 4045.678
    results.arms[1].test_perplexity_after = 4000.0
    runs = compare([Run("one", results), Run("two", other)])
    after = [row[-1] for row in results_rows(runs.results, runs).rows]
    assert after[1:3] == ["46.68\u00a0±\u00a012.71", "4,023\u00a0±\u00a0290"]


def test_several_pruned_models_of_a_target_are_told_apart(results: Results) -> None:
    distilled = make_arm("depth", pruned=True, losses=[4.0, 2.7, 2.6, 2.34], shape=results.arms[0].shape)
    distilled.name = "depth, distilled"
    results.arms.append(distilled)
    assert "“depth, pruned” won by 0.10" in outcome(results)
    assert "“depth, distilled” won by 0.30" in outcome(results)


def test_a_row_says_what_the_numbers_say(results: Results) -> None:
    table = results_rows(results)
    cells = dict(zip([column.plain for column in table.columns], table.rows[1], strict=True))
    shape = results.arms[0].shape
    # By hand: a layer has 2 * 64 * 8 * 10 + 3 * 64 * 128 = 34,816 weights in matrices and 128 in norms.
    assert (PARENT.parameters, shape.parameters) == (267_840, 197_952)
    assert (PARENT.body_parameters, shape.body_parameters) == (139_840, 69_952)
    assert cells["Model"] == "depth, pruned"
    assert cells["Parameters (k)"] == "197.95"
    assert cells["removed (%)"] == "26.1"
    assert cells["Body (k)"] == "69.95"
    assert cells["body removed (%)"] == "50.0"
    assert cells["TP × PP"] == "2\u00a0×\u00a01"
    assert cells["training tokens (k)"] == "40.96"
    # 3 * (2 * (2 * 34,816 + 64,000) + 2 * 2 * 64 * 64) = 850,944 a token of this model, 1,317,888 of the parent.
    assert cells["training FLOPs"] == "3.49\u00a0×\u00a010¹⁰"
    assert cells["FLOPs with ancestors"] == "1.32\u00a0×\u00a010¹⁵"
    assert cells["validation loss (nats)"] == "2.54"
    assert cells["gap (nats)"] == "+0.10"
    assert cells["test PPL before"] == "1,234"
    assert cells["test PPL after"] == "45.68"


def test_masked_weights_count_as_removed(results: Results) -> None:
    arm = results.arms[0]
    arm.shape, arm.masked_parameters = PARENT, 69_920
    row = results_rows(results).rows[1]
    assert row[2] == "26.1"  # 69,920 / 267,840
    assert row[4] == "50.0"  # 69,920 / 139,840


def test_what_is_missing_is_a_dash(results: Results) -> None:
    arm = results.arms[0]
    arm.validation, arm.training, arm.parallel, arm.ledger = [], [], {}, Ledger()
    arm.test_perplexity_before = arm.test_perplexity_after = None
    assert results_rows(results).rows[1][5:] == ["–"] * 8


def test_an_unknown_pretraining_is_unknown_and_not_free(results: Results) -> None:
    arm = results.arms[0]
    arm.ledger.charge("parent pretraining", None, PARENT, 0, training=True)
    assert results_rows(results).rows[1][8] == "–"
    assert "unknown (depth, pruned)" in total_cost(results)


def test_the_second_budget_is_the_ratio_of_all_flops(results: Results) -> None:
    pruned, scratch = results.arms[0].ledger.total.flops, results.arms[1].ledger.total.flops
    assert pruned is not None
    assert scratch is not None
    training = 40_960 * 850_944
    assert (pruned, scratch) == (10**9 * 1_317_888 + 2048 * 1_317_888 // 3 + training, training)
    assert "3.78\u00a0×\u00a010⁴ (depth, pruned)" in total_cost(results)
    (charge,) = results.arms[1].ledger.charges
    results.arms[0].ledger.charges = [charge, dataclasses.replace(charge, activity="teacher")]
    assert "2.00 (depth, pruned)" in total_cost(results)


@pytest.mark.parametrize("width", [80, 120])
def test_no_number_is_cut_off_in_the_terminal(results: Results, width: int) -> None:
    results.parent.name = "a-parent-with-quite-a-long-name"
    text = _terminal(results, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for number in ("267.84", "26.1", "2\u00a0×\u00a01", "40.96", "2.54", "+0.10", "−0.20", "1,234", "45.68", "11.02"):
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.,])", text), number


def test_a_terminal_that_is_too_narrow_shows_no_part_of_a_number_as_a_number(results: Results) -> None:
    results.title, results.arms = "", results.arms[:2]
    table = _terminal(results, 48).split("At equal")[0]
    cells = {part for row in results_rows(results).rows for cell in row for part in cell.split("\u00a0")}
    shown = re.findall(r"[\d.,+−]*\d[\d.,]*…?", table)
    assert "…" not in table
    assert all(number in cells or number.endswith("…") for number in shown), shown


def test_names_are_no_markup(results: Results) -> None:
    results.arms[0].name = "[red]a|b[/red]"
    assert "[red]a|b[/red]" in _terminal(results, 120)
    lines = markdown_table(results).splitlines()
    assert lines[3].startswith("| [red]a\\|b[/red] |")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {14}


def test_the_page_says_how_random_weights_were_drawn_and_what_budgets_count(results: Results) -> None:
    def notes(train: dict[str, object]) -> str:
        results.recipe = {"train": train}
        return "\n".join(notes_of(compare([Run("one", results)])))

    assert "as Megatron draws them" in notes({})
    assert "2^20" not in notes({})
    paper = notes({"initialisation": "maxtext", "paper_steps": True})
    assert "as the MaxText of the published runs (arXiv 2606.14150) draws them, so that scratch begins where" in paper
    assert "2^20 tokens for a million; all other numbers are of tokens that were seen" in paper
    results.arms = [arm for arm in results.arms if arm.initialisation == "pruned"]
    assert "Random weights" not in notes({})


def _with_a_smaller_vocabulary(results: Results) -> Results:
    """Return the results with 600 of 1,000 tokens in both arms of width, and bits per byte of every model."""
    assert results.parent is not None
    results.parent.test_bits_per_byte = 1.134
    for index, arm in enumerate(results.arms):
        arm.test_bits_per_byte_before, arm.test_bits_per_byte_after = 2.5, 1.2 + index / 100
        if arm.target == "width":
            arm.shape = arm.shape.replace(vocab=600)
    return results


def test_models_of_several_vocabularies_are_compared_by_bits_per_byte(results: Results) -> None:
    run = Run("run", _with_a_smaller_vocabulary(results), {})
    table = results_rows(run.results)
    assert [column.plain for column in table.columns][-2:] == ["test bits per byte before", "test bits per byte after"]
    assert [row[-2:] for row in table.rows][:2] == [["–", "1.134"], ["2.500", "1.200"]]
    assert "bits" in _terminal(results, 100)
    assert any("across vocabularies compare bits per byte" in note for note in notes_of(compare([run])))
    # Within a target the tokens are the same, and so are the terms of the gap.
    assert results.gap(results.arms[2]) == pytest.approx(-0.20)


def test_bits_per_byte_have_an_interval_over_seeds(results: Results) -> None:
    """Of 1.20 and 1.22: mean 1.21, deviation 0.0141, and t of one degree of freedom is 12.706."""
    other = copy.deepcopy(_with_a_smaller_vocabulary(results))
    other.recipe["train"]["seed"] = 2
    other.arms[0].test_bits_per_byte_after = 1.22
    runs = compare([Run("one", results, {}), Run("two", other, {})])
    assert results_rows(runs.results, runs).rows[1][-1] == "1.210\u00a0±\u00a00.127"
    (arm, *_) = report_data(runs)["arms"]
    assert arm["test_bits_per_byte_after_deviation"] == pytest.approx(0.02 / 2**0.5)


def test_bits_per_byte_that_were_not_measured_take_no_column(results: Results) -> None:
    assert not [column for column in results_rows(results).columns if "bits" in column.plain]
    assert "bits" not in _terminal(results, 100)
    assert not any("bits" in name for name in results.to_json()["arms"][0])
