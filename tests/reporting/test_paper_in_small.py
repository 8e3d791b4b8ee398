"""The published results of ``paper_in_small`` are those that the documents state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_pvs.reporting.compare.compare import compare, read_runs
from nemo_pvs.reporting.compare.estimates import EQUAL_TOTAL, EQUAL_TRAINING, gap
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.html import markdown_report
from nemo_pvs.reporting.numbers import fixed, plus_minus

ROOT = Path(__file__).parents[2]
RESULTS = "recipes/paper_in_small/results/quick"


@pytest.fixture(scope="module")
def runs() -> SideBySide:
    return compare(read_runs([str(ROOT / RESULTS)]))


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


def test_findings(runs: SideBySide) -> None:
    held = {finding.name: finding.judgement for finding in runs.findings}
    assert held == {
        **{"1a": "holds", "1b": "holds", "1c": "undecided"},
        **{"2a": "holds", "2b": "undecided", "2c": "undecided"},
    }
    page = (ROOT / "docs/paper_in_small.md").read_text()
    stated = dict(re.findall(r"^\| (\d[abc])\. [^|]* \| (holds|undecided|needs)", page, re.MULTILINE))
    assert stated == {**held, "1c": "needs"}


def test_gaps_of_the_page_and_of_the_readme(runs: SideBySide) -> None:
    gaps = _gaps(runs)
    page = (ROOT / "docs/paper_in_small.md").read_text()
    for target, name in (("depth-50", "depth"), ("width-50", "width"), ("wanda-50", "Wanda")):
        assert f"| {name} | {' | '.join(gaps[target])} |" in page
        assert f"({gaps[target][-1]})" in (ROOT / "README.md").read_text()


def test_the_report_is_that_of_the_data(runs: SideBySide) -> None:
    """Except for when it was made, and from which path."""

    def lasting(report: str) -> list[str]:
        return [line for line in report.splitlines() if not line.startswith(("Made ", "Repeat it: "))]

    assert lasting((ROOT / RESULTS / "report.md").read_text()) == lasting(markdown_report(runs, reference=True))
