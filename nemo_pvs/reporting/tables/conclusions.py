"""The paper's findings and the tests of non-inferiority in words, for page, Markdown and terminal."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pvs.reporting.compare.verdicts import NonInferiority, PaperFinding

FINDINGS_TITLE = "Findings of the paper in these runs"
FINDINGS_NOTE = (
    "A finding holds or fails where 95 % intervals over seeds lie on one side of zero. Where one comparison of "
    "several decides, its interval is widened for all of them (Bonferroni). Numbers are mean ± half of the 95 % "
    "interval."
)
RECOVERY_TITLE = "Against the parent"
RECOVERY_HEADINGS = ["Pruned model", "measure", "verdict"]
RECOVERY_NOTE = (
    "Positive: the pruned model is better than its parent. Each verdict rests on one-sided tests at 5 %, not "
    "corrected for their number; equivalent: both one-sided tests pass."
)


def finding_line(finding: PaperFinding) -> str:
    """Return a finding with its judgement, reason and source in Markdown."""
    return f"**{finding.name} {finding.judgement}:** {finding.statement}. {finding.reason} ({finding.source})"


def recovery_cells(tests: Sequence[NonInferiority]) -> list[list[str]]:
    """Return the formatted cells of tests of non-inferiority."""
    return [[test.arm, test.measure, test.words] for test in tests]


def conclusions_text(findings: Sequence[PaperFinding], tests: Sequence[NonInferiority]) -> list[str]:
    """Return lines for the terminal: the findings, and the verdicts against the parent."""
    lines = []
    if findings:
        lines.append(f"{FINDINGS_TITLE} (arXiv 2606.14150):")
        lines += [f"  {item.name} {item.judgement}: {item.statement}. {item.reason}" for item in findings]
    if tests:
        lines.append(f"{RECOVERY_TITLE}:")
        lines += [f"  {test.sentence}" for test in tests]
    return lines
