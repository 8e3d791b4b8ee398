"""Saves the results of a run as data: its numbers, hashes, versions and recipe, but no weights and no training curves.

    python -m nemo_pvs.recipes.paper_in_small.publish runs/paper_in_small_quick FOLDER

``pvs report FOLDER`` shows the same report as for the run itself.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from nemo_pvs.reporting.compare.compare import RESULTS, compare, read_runs
from nemo_pvs.reporting.data import csv_text, report_data
from nemo_pvs.reporting.html import markdown_report
from nemo_pvs.system.files import write_text


def main(run: Path, folder: Path) -> None:
    """Write ``seed-N/results.json``, ``report.csv``, ``equal_terms.csv`` and ``report.md``."""
    runs = read_runs([str(run)])
    for one in runs:
        arms = [replace(arm, training=arm.training[-1:]) for arm in one.results.arms]
        replace(one.results, arms=arms).save(folder / Path(one.label).relative_to(run) / RESULTS)
    kept = compare(read_runs([str(folder)]))
    data = report_data(kept, reference=True)
    write_text(folder / "report.csv", csv_text(data["arms"]))
    write_text(folder / "equal_terms.csv", csv_text(data["equal_terms"]))
    report = markdown_report(kept, reference=True)
    write_text(
        folder / "report.md", f"{report}\nTrained by `pvs run {_packaged(kept.results.recipe_name)} --jobs 2`.\n"
    )


def _packaged(name: str) -> str:
    """Return the path of the packaged recipe with this name, as ``pvs run`` takes it."""
    for path in packaged_recipes():
        if load_recipe(path).name == name:
            return path
    raise UserError(f"no packaged recipe is called {name}; publish runs of packaged recipes only.")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m nemo_pvs.recipes.paper_in_small.publish RUN FOLDER")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"publish: {error}")
