"""How long the stages of a finished run took, and the parts of each training.

    python -m tests.benchmarks.stages runs/demo

The steps of a training and what lies between them, validations and saves, are in its metrics. The rest of its stage is
the start of its ranks, the last validation and save, and the result as a Hugging Face folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from nemo_pvs.system.files import read_json
from nemo_pvs.system.progress import console
from nemo_pvs.training import metrics
from nemo_pvs.training.job import JOB_FILE, METRICS_FILE, TrainingJob


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    rows = list(seconds(options.parse_args().folder))
    table = Table("stage", "s")
    for name, spent in [*rows, ("all", sum(spent for _, spent in rows))]:
        table.add_row(name, f"{spent:.1f}")
    console.print(table)


def seconds(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield each stage of a run, or part of a training, with its seconds, in the order in which they were finished."""
    records = [path for path in (folder / "stages").glob("*.json") if not path.name.endswith(".begun.json")]
    for path in sorted(records, key=lambda path: path.stat().st_mtime):
        record = read_json(path)
        name, spent = record["stage"], record["seconds"]
        arm = folder / name
        if not (arm / METRICS_FILE).exists():
            yield name, spent
            continue
        curve = metrics.read(arm / METRICS_FILE)
        steps = metrics.training_seconds(curve, TrainingJob.load(arm / JOB_FILE).training.tokens_per_step)
        between = curve.training[-1]["seconds"] - steps
        yield from ((f"{name}: steps", steps), (f"{name}: between steps", between))
        yield f"{name}: start and end", spent - steps - between


if __name__ == "__main__":
    main()
