"""What comes back: measures before, during and after training relative to the parent's, and their verdicts."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest

from nemo_pvs.reporting.compare.compare import compare
from nemo_pvs.reporting.compare.non_inferiority import judge_non_inferiority
from nemo_pvs.reporting.compare.regained import Regained, regained
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.compare.scores import Score, unit_of_score
from nemo_pvs.reporting.figures.regained import regained_panels
from nemo_pvs.reporting.html import write_files
from nemo_pvs.reporting.results import Results
from nemo_pvs.reporting.statistics import mean_estimate
from nemo_pvs.reporting.tables.regained import regained_cells, regained_headings

from .conftest import TOKENS

PARENT, BEFORE, DURING, AFTER = (letter * 64 for letter in "abcd")
PROMPTS = 40


def _scores(repetition: float, kl: float, accuracy: float, written: float = 0.5) -> dict[str, Score]:
    """Return scores whose values by prompt are scattered around these."""
    scores = {}
    for name, value, higher in (
        ("boolq/0-shot/acc", accuracy, True),
        ("boolq/0-shot/acc_norm", accuracy, True),
        ("gsm8k/5-shot/exact_match,strict-match", written, True),
        ("recovery/test/repetition", repetition, False),
        ("recovery/test/kl", kl, False),
        ("recovery/test/kl_1_16", kl / 2, False),
        ("recovery/test/kl_17_32", kl, False),
        ("recovery/test/kl_33_64", 2 * kl, False),
        ("perplexity/c4/perplexity", 12.0, False),
    ):
        single = tuple(value * (1 + 0.1 * (-1) ** index) for index in range(PROMPTS))
        scores[name] = Score(value, 0.01, PROMPTS, higher, single, f"questions of {name}")
    return scores


def _run(results: Results, seed: int = 1, after: float = 0.2) -> Run:
    results = copy.deepcopy(results)
    results.recipe["train"]["seed"] = seed
    results.hashes |= {"parent weights": PARENT, "model depth-pruned": AFTER}
    results.arms[0].before_the_end = {0: BEFORE, TOKENS // 2: DURING}
    scores = {
        PARENT: _scores(0.1, 0.0, 0.8),
        BEFORE: _scores(0.91, 5.0, 0.4),
        DURING: _scores(0.55, 1.0, 0.4),
        AFTER: _scores(after, 0.5, 0.6),
    }
    return Run(f"run {seed}", results, scores)


def _of(rows: list[Regained], measure: str) -> Regained:
    return next(row for row in rows if row.measure == measure)


def test_each_measure_is_relative_to_the_parents(results: Results) -> None:
    rows = regained(compare([_run(results)]))
    assert {row.arm for row in rows} == {"depth, pruned"}, "the other arms were evaluated at their end only"
    shares = {row.measure: [row.share(value) for _, value in row.points] for row in rows}
    expected = {
        "validation loss": [math.exp(2.4 - loss) for loss in (4.0, 2.75, 2.625, 2.54)],
        "boolq/0-shot/acc_norm": [0.5, 0.5, 0.75],
        "gsm8k/5-shot/exact_match,strict-match": [1.0, 1.0, 1.0],
        "recovery/test/repetition": [0.1, 0.5, 0.8 / 0.9],
        "recovery/test/kl": [math.exp(-5), math.exp(-1), math.exp(-0.5)],
        "recovery/test/kl_1_16": [math.exp(-2.5), math.exp(-0.5), math.exp(-0.25)],
        "recovery/test/kl_17_32": [math.exp(-5), math.exp(-1), math.exp(-0.5)],
        "recovery/test/kl_33_64": [math.exp(-10), math.exp(-2), math.exp(-1)],
    }
    assert shares.keys() == expected.keys()
    for measure, values in expected.items():
        assert shares[measure] == pytest.approx(values), measure
    assert [tokens for tokens, _ in _of(rows, "recovery/test/kl").points] == [0, TOKENS // 2, TOKENS]


def test_a_parent_whose_share_is_zero_is_not_divided_by() -> None:
    assert Regained("a", "t/0-shot/acc", "points", True, 0.0, ()).share(0.5) is None
    assert Regained("a", "recovery/test/repetition", "points", False, 1.0, ()).share(0.5) is None


def test_seeds_are_averaged(results: Results) -> None:
    rows = regained(compare([_run(results, 1, after=0.2), _run(results, 2, after=0.4)]))
    assert _of(rows, "recovery/test/repetition").points[-1] == (TOKENS, pytest.approx(0.3))


def test_without_models_before_the_end_there_is_nothing(results: Results, tmp_path: Path) -> None:
    run = _run(results)
    run.results.arms[0].before_the_end = {}
    runs = compare([run])
    assert regained(runs) == []
    write_files(runs, tmp_path)
    assert "What comes back" not in (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()
    assert "regained" not in json.loads((tmp_path / "report.json").read_text())


def test_the_report_shows_them(results: Results, tmp_path: Path) -> None:
    runs = compare([_run(results)])
    write_files(runs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    figure = "depth, pruned, relative to the parent after training: likelihood 0.87; boolq 0.75; gsm8k/5-shot 1.00; "
    assert f'aria-label="{figure}new 4-grams 0.89; KL after 1–16 tokens 0.78; KL after 33–64 tokens 0.37."' in page
    rows = regained(runs)
    assert regained_headings(rows)[3:] == ["before training", "20.48k tokens", "40.96k tokens"]
    cells = regained_cells(rows)
    assert cells[0][1:] == ["validation loss", "2.400", "4.000 (0.20)", "–", "2.540 (0.87)"]
    assert ["depth, pruned", "repeated 4-grams", "10.0 %", "91.0 % (0.10)", "55.0 % (0.50)", "20.0 % (0.89)"] in cells
    assert "| repeated 4-grams | 10.0 % |" in (tmp_path / "report.md").read_text()
    saved = json.loads((tmp_path / "report.json").read_text())["regained"]
    assert {
        "arm": "depth, pruned",
        "measure": "recovery/test/repetition",
        "parent": 0.1,
        "tokens": 0,
        "value": 0.91,
        "relative": pytest.approx(0.1),
    } in saved


def test_a_share_beyond_the_axis_is_drawn_at_its_top_and_named() -> None:
    doubled = Regained("depth", "boolq/0-shot/acc", "points", True, 0.4, ((0, 0.2), (10, 0.8)))
    equal = Regained("depth", "arc_easy/0-shot/acc", "points", True, 0.4, ((0, 0.2), (10, 0.4)))
    (panel,) = regained_panels([doubled, equal])
    assert ">boolq (2.00)<" in panel
    assert ">arc_easy<" in panel
    assert "boolq 2.00; arc_easy 1.00." in panel


def test_results_keep_the_models_before_the_end(results: Results) -> None:
    run = _run(results)
    plain = json.loads(json.dumps(run.results.to_json()))
    assert Results.from_json(plain).arms[0].before_the_end == {0: BEFORE, TOKENS // 2: DURING}
    assert "before_the_end" not in plain["arms"][1]


def test_the_verdict_turns_the_sign_where_lower_is_better(results: Results) -> None:
    """More repetition and more divergence are a loss; both are paired by prompt."""
    tests = {
        test.measure: test for test in judge_non_inferiority(compare([_run(results)]), 5.0) if "depth" in test.arm
    }
    assert set(tests) == {
        "boolq/0-shot/acc_norm",
        "gsm8k/5-shot/exact_match,strict-match",
        "recovery/test/repetition",
    }
    repeated = tests["recovery/test/repetition"]
    expected = mean_estimate([-100 * 0.1 * (1 + 0.1 * (-1) ** index) for index in range(PROMPTS)])
    assert repeated.difference is not None
    assert expected is not None
    assert repeated.difference.mean == pytest.approx(expected.mean)
    assert repeated.difference.stderr == pytest.approx(expected.stderr)
    assert (repeated.verdict, repeated.basis) == ("inferior", "40 prompts and 1 seed")
    # All 40 answers are as right as the parent's, which does not exclude that one in fourteen is not.
    assert tests["gsm8k/5-shot/exact_match,strict-match"].verdict == "undecided"

    nats = {test.measure: test for test in judge_non_inferiority(compare([_run(results)]), 1.0, "nats")}
    divergence = nats["recovery/test/kl"]
    assert divergence.difference is not None
    assert divergence.difference.mean == pytest.approx(-0.5)
    assert (divergence.verdict, divergence.basis) == ("equivalent", "40 windows and 1 seed")
    assert set(nats) == {"validation loss", "recovery/test/kl"}


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("arc_easy/0-shot/acc_norm", "points"),
        ("gsm8k/5-shot/exact_match,flexible-extract", "points"),
        ("ifeval/0-shot/prompt_level_strict_acc", "points"),
        ("recovery/test/distinct_1", "points"),
        ("recovery/test/agreement", "points"),
        ("recovery/test/kl_17_64", "nats"),
        ("perplexity/c4/loss", "nats"),
        ("perplexity/c4/perplexity", None),
        ("perplexity/c4/bits_per_byte", None),
    ],
)
def test_units_of_scores(name: str, unit: str | None) -> None:
    assert unit_of_score(name) == unit
