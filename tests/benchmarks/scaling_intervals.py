"""How often the 95 % intervals of scaling laws and of their predictions hold the truth.

    python -m tests.benchmarks.scaling_intervals [--repetitions 400] [--draws 79]

Runs are drawn from laws with known parameters (``tests/scaling/coverage.py``), fitted, and asked. Each cell has the
share for the calibrated intervals and, after the stroke, for the percentiles of resampled residuals.
"""

from __future__ import annotations

import argparse

from rich.table import Table

from nemo_pvs.system.progress import console
from tests.scaling.coverage import CASES, PREDICTIONS, coverage


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--repetitions", type=int, default=400)
    options.add_argument("--draws", type=int, default=79)
    given = options.parse_args()
    console.print(table(given.repetitions, given.draws))


def table(repetitions: int, draws: int) -> Table:
    """Return the coverage of every case in per cent: of its parameters on average, and of each prediction."""
    rows = Table("", "parameters, mean", "lowest to highest", *PREDICTIONS)
    for name, case in CASES.items():
        found = coverage(case, repetitions, draws=draws)
        parameters = [shares for quantity, shares in found.items() if quantity not in PREDICTIONS]
        means = {kind: sum(shares[kind] for shares in parameters) / len(parameters) for kind in parameters[0]}
        calibrated = [shares["calibrated"] for shares in parameters]
        spread = f"{100 * min(calibrated):.1f} to {100 * max(calibrated):.1f}"
        rows.add_row(name, _cell(means), spread, *(_cell(found.get(prediction)) for prediction in PREDICTIONS))
    return rows


def _cell(shares: dict[str, float] | None) -> str:
    return f"{100 * shares['calibrated']:.1f} / {100 * shares['resampled']:.1f}" if shares else ""


if __name__ == "__main__":
    main()
