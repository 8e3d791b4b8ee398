"""The published results of ``paper_in_small`` are those that the documents state."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.reporting.compare.compare import compare, read_runs
from nemo_pvs.reporting.compare.estimates import EQUAL_TOTAL, EQUAL_TRAINING, gap
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.html import markdown_report
from nemo_pvs.reporting.numbers import fixed, plus_minus
from nemo_pvs.reporting.results import Results
from nemo_pvs.reporting.statistics import mean_estimate

ROOT = Path(__file__).parents[2]
RESULTS = "recipes/paper_in_small/results/quick"
OTHER_METHODS = "recipes/paper_in_small/results/other_methods"
SPARSEGPT = "recipes/paper_in_small/results/sparsegpt"
THREE_QUARTERS = "recipes/paper_in_small/results/three_quarters"
WITH_TEACHER = "recipes/paper_in_small/results/distilled"


@pytest.fixture(scope="module")
def runs() -> SideBySide:
    """Those with arms at equal total tokens."""
    return compare(read_runs([str(ROOT / folder) for folder in (RESULTS, SPARSEGPT)]))


def _gaps(runs: SideBySide) -> dict[str, list[str]]:
    """Return the gaps of every target as documents write them: at equal training, then at equal total tokens."""
    gaps: dict[str, list[str]] = {}
    for setting in (EQUAL_TRAINING, EQUAL_TOTAL):
        for arm in runs.results.arms:
            found = gap(runs, arm, setting) if arm.initialisation == "pruned" else None
            if found is not None and found.half_width is not None:
                shown = plus_minus(fixed(found.mean, signed=True), found.half_width)
                gaps.setdefault(arm.target, []).append(shown.replace("\N{NO-BREAK SPACE}", " "))
    return gaps


@pytest.fixture(scope="module")
def all_runs() -> SideBySide:
    """All without a teacher."""
    folders = (RESULTS, SPARSEGPT, OTHER_METHODS, THREE_QUARTERS)
    return compare(read_runs([str(ROOT / folder) for folder in folders]))


def test_findings(runs: SideBySide, all_runs: SideBySide) -> None:
    """Those at equal total tokens are judged by the runs that have such arms."""
    judged = {finding.name: finding.judgement for finding in all_runs.findings if finding.name.startswith("1")}
    judged |= {finding.name: finding.judgement for finding in runs.findings if finding.name.startswith("2")}
    page = (ROOT / "docs/paper_in_small.md").read_text()
    stated = dict(re.findall(r"^\| (\d[abc])\. [^|]* \| (holds|fails|undecided)", page, re.MULTILINE))
    assert stated == judged
    (shrinks,) = (finding for finding in all_runs.findings if finding.name == "1c")
    assert "Of 9 comparisons, in nats per token, 5 agree" in shrinks.reason
    assert "and 4 are open" in shrinks.reason


def test_gaps_with_a_teacher_are_compared_among_themselves() -> None:
    """Whatever the order of the folders; half of the width with a teacher was compared with three quarters without."""
    for folders in ((RESULTS, WITH_TEACHER, THREE_QUARTERS), (WITH_TEACHER, RESULTS, THREE_QUARTERS)):
        runs = compare(read_runs([str(ROOT / folder) for folder in folders]))
        (shrinks,) = (finding for finding in runs.findings if finding.name == "1c")
        assert "Of 9 comparisons, in nats per token, 5 agree" in shrinks.reason
    runs = compare(read_runs([str(ROOT / folder) for folder in (WITH_TEACHER, THREE_QUARTERS)]))
    (shrinks,) = (finding for finding in runs.findings if finding.name == "1c")
    assert "Missing: gaps of one method at two shares removed" in shrinks.reason


def test_gaps_of_the_page_and_of_the_readme(runs: SideBySide) -> None:
    gaps = _gaps(runs)
    page = (ROOT / "docs/paper_in_small.md").read_text()
    for target, name in (
        ("depth-50", "depth"),
        ("width-50", "width"),
        ("wanda-50", "Wanda"),
        ("sparsegpt-50", "SparseGPT"),
    ):
        assert f"| {name} | {' | '.join(gaps[target])} |" in page
        assert f"({gaps[target][-1]})" in (ROOT / "README.md").read_text()


def test_gaps_of_other_methods_and_at_three_quarters(all_runs: SideBySide) -> None:
    gaps = _gaps(all_runs)
    page = (ROOT / "docs/paper_in_small.md").read_text()
    for target, name in (
        ("flap-50", "FLAP"),
        ("sheared-50", "Sheared LLaMA"),
        ("wanda-2-4", "Wanda, 2:4"),
        ("sparsegpt-2-4", "SparseGPT, 2:4"),
        ("depth-75", "depth"),
        ("width-75", "width"),
        ("wanda-75", "Wanda"),
    ):
        assert f"| {name} | {' | '.join(gaps[target])} |" in page


def test_further_numbers_of_the_page_and_of_the_readme(all_runs: SideBySide) -> None:
    page, readme = (ROOT / "docs/paper_in_small.md").read_text(), (ROOT / "README.md").read_text()
    equal_training = [float(number.split()[0]) for numbers in _gaps(all_runs).values() for number in numbers[:3]]
    assert f"{len(equal_training)} of {len(equal_training)}\ncomparisons by {min(equal_training):.2f}" in readme
    assert f"to {max(equal_training):.2f} nats per token" in readme

    losses: dict[str, list[str]] = {}
    for seed in (1, 2, 3):
        results = json.loads((ROOT / RESULTS / f"seed-{seed}" / "results.json").read_text())
        for arm in results["arms"]:
            losses.setdefault(arm["name"], []).append(f"{arm['validation'][-1]['loss']:.2f}")
        losses.setdefault("parent", []).append(f"{results['parent']['validation_loss']:.2f}")
    one, two, three = losses["depth-50, random, 1792k"]
    assert f"loss {three} after 0.25 P, {one} and {two} in the others" in page
    one, two, three = losses["depth-50, random, 8960k"]
    assert f"after 1.25 P ({three}, {one} and {two})" in page
    one, two, three = losses["wanda-50, pruned, 1792k"]
    assert f"is below it ({one}, {two} and {three})" in page
    one, two, three = losses["parent"]
    assert f"Its loss is {one}, {two} and {three} in the three seeds" in page


def test_learning_rates() -> None:
    """Every rate of the sweeps is in the table of the page, the best of a row in bold and in the recipes."""
    with open(ROOT / "recipes/paper_in_small/results/rates.csv") as file:
        swept = list(csv.DictReader(file))
    rows: dict[tuple[str, str], dict[float, float]] = {}
    for run in swept:
        key = (run["recipe"].removeprefix("paper_in_small/"), f"{run['target']} {run['initialisation']}")
        rows.setdefault(key, {})[float(run["learning_rate"])] = float(run["validation_loss"])
    names = {
        ("parent_rates", "parent random"): "P",
        ("smaller_parent_rates", "parent random"): "a model of half P's layers",
        ("rates", "depth-50 pruned"): "depth, pruned",
        ("rates", "depth-50 random"): "depth, from scratch",
        ("rates", "wanda-50 pruned"): "Wanda, pruned",
        ("rates", "wanda-50 random"): "Wanda's masks, from scratch",
    }
    assert set(rows) == set(names)
    page = (ROOT / "docs/paper_in_small.md").read_text()
    headings = re.search(r"^\| \| tokens \|(.*)\|$", page, re.MULTILINE)
    assert headings
    rates = [float(heading) for heading in headings[1].split("|")]
    best = {}
    for key, losses in rows.items():
        best[key] = min(losses, key=losses.__getitem__)
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        cells[rates.index(best[key])] = f"**{losses[best[key]]:.3f}**"
        line = next(line for line in page.splitlines() if line.startswith(f"| {names[key]} | "))
        assert [cell.strip() for cell in line.split("|")[3:-1]] == cells
    base, full = load_recipe("paper_in_small/parent"), load_recipe("paper_in_small/full")
    assert best["parent_rates", "parent random"] == base.train.learning_rate.random
    assert best["rates", "depth-50 pruned"] == full.train.learning_rate.pruned
    assert best["rates", "depth-50 random"] == full.train.learning_rate.random
    assert best["rates", "wanda-50 pruned"] == full.targets["wanda-50"].learning_rate.pruned
    assert best["rates", "wanda-50 random"] == full.targets["wanda-50"].learning_rate.random


Losses = dict[tuple[str, str, int, str], float]
"""Validation losses by target, initialisation, training tokens and seed."""


def _losses(folder: str) -> Losses:
    losses: Losses = {}
    for seed in "123":
        for arm in Results.load(ROOT / folder / f"seed-{seed}" / "results.json").arms:
            tokens = arm.ledger.training.tokens
            assert tokens is not None
            assert arm.validation_loss is not None
            losses[arm.target, arm.initialisation, tokens, seed] = arm.validation_loss
    return losses


def _losses_of_top_32() -> Losses:
    losses: Losses = {}
    with open(ROOT / "recipes/paper_in_small/results/distilled_top_32.csv") as file:
        for run in csv.DictReader(file):
            key = (run["target"], run["initialisation"], int(run["tokens"]), run["seed"])
            losses[key] = float(run["validation_loss"])
    return losses


def test_what_the_teacher_is_worth() -> None:
    page = (ROOT / "docs/paper_in_small.md").read_text()
    alone, taught = "width-50", "width-50-distilled"
    for top_k, losses in ((32, _losses_of_top_32()), (256, _losses(RESULTS) | _losses(WITH_TEACHER))):

        def cells(minuend: tuple[str, str], subtrahend: tuple[str, str], losses: Losses = losses) -> str:
            shown = []
            for tokens in (358_400, 1_075_200, 1_792_000):
                differences = [
                    losses[(*minuend, tokens, seed)] - losses[(*subtrahend, tokens, seed)] for seed in "123"
                ]
                mean = mean_estimate(differences)
                assert mean is not None
                text = plus_minus(fixed(mean.mean, signed=True), mean.half_width)
                shown.append(text.replace("\N{NO-BREAK SPACE}", " "))
            return " | ".join(shown)

        for name, minuend, subtrahend in (
            (f"the gain from {top_k} of its tokens, pruned", (alone, "pruned"), (taught, "pruned")),
            (f"the gain from {top_k} of its tokens, from scratch", (alone, "random"), (taught, "random")),
            (f"scratch minus pruned, both with {top_k} of its tokens", (taught, "random"), (taught, "pruned")),
            ("scratch minus pruned, on the text alone", (alone, "random"), (alone, "pruned")),
        ):
            assert f"| {name} | {cells(minuend, subtrahend)} |" in page


@pytest.mark.parametrize("folder", [RESULTS, SPARSEGPT, OTHER_METHODS, THREE_QUARTERS, WITH_TEACHER])
def test_the_report_is_that_of_the_data(folder: str) -> None:
    """Except for when it was made, and from which path."""

    def lasting(report: str) -> list[str]:
        return [
            line
            for line in report.splitlines()
            if line and not line.startswith(("Made ", "Repeat it: ", "Trained by "))
        ]

    runs = compare(read_runs([str(ROOT / folder)]))
    assert lasting((ROOT / folder / "report.md").read_text()) == lasting(markdown_report(runs, reference=True))
