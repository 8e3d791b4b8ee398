"""How learning rates were chosen, as rows for the page and the Markdown file."""

from __future__ import annotations

from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.numbers import fixed, scientific
from nemo_pvs.reporting.results import SweepResult

SWEEP_TITLE = "Learning rates"
SWEEP_HEADINGS = ["Arms", "Tried on", "Loss by rate", "Chosen", "Tokens", "FLOPs"]
SWEEP_NOTES = (
    "The rate with the lowest validation loss on the first seed, for all seeds and targets of this kind of arm.",
    "These tokens are charged to the comparison, not to an arm.",
)
AT_THE_EDGE = "A rate at the edge of those tried was the best, so that another might be better still."


def sweeps_of(runs: SideBySide) -> list[SweepResult]:
    """Return the sweeps of all runs, each once."""
    sweeps = {repr(sweep): sweep for run in runs.runs for sweep in run.results.sweeps}  # NaN does not equal itself
    return list(sweeps.values())


def sweep_cells(runs: SideBySide) -> list[list[str]]:
    """Return a row per kind of arm whose learning rate was chosen, as in ``SWEEP_HEADINGS``."""
    rows = []
    for sweep in sweeps_of(runs):
        losses = ", ".join(f"{rate:g}: {fixed(loss, 3)}" for rate, loss in zip(sweep.rates, sweep.losses, strict=True))
        cost = [f"{sweep.tokens:,}", scientific(sweep.flops)]
        rows.append([sweep.kind, sweep.target, losses, f"{sweep.chosen:g}", *cost])
    return rows


def sweep_notes(runs: SideBySide) -> list[str]:
    """Return the notes below the table of sweeps."""
    return [*SWEEP_NOTES, *([AT_THE_EDGE] if any(sweep.at_the_edge for sweep in sweeps_of(runs)) else [])]
