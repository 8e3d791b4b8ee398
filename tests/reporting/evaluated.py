"""What ``pvs evaluate`` would have written of a run's models."""

from __future__ import annotations

import math
from pathlib import Path

from nemo_pvs.system.files import write_json

TASKS = {"arc_easy": ("acc", "acc_norm"), "boolq": ("acc",)}


def write_evaluation(folder: Path, answers: dict[str, dict[str, list[float]]], *, losses: bool = True) -> None:
    """Write ``results.json`` and the files of single questions.

    Args:
        folder: Of the evaluation.
        answers: By fingerprint and task, 1.0 for every right answer.
        losses: Measure a text as well.
    """
    models = []
    for fingerprint, tasks in answers.items():
        measured = {}
        for task, right in tasks.items():
            value = sum(right) / len(right)
            about = {
                "value": value,
                "stderr": math.sqrt(value * (1 - value) / (len(right) - 1)),
                "higher_is_better": True,
                "documents": len(right),
            }
            metrics = dict.fromkeys(TASKS[task], about)
            measured |= {f"{task}/0-shot/{metric}": about for metric in metrics}
            write_json(
                folder / "measured" / fingerprint[:16] / f"{task}.json",
                {
                    "name": f"{task}/0-shot",
                    "settings": {"model": fingerprint, "task": f"questions of {task}", "limit": None},
                    "metrics": {metric: {**about, "by_document": right} for metric in metrics},
                },
            )
        if losses:
            about = {"value": 3.5, "stderr": 0.25, "higher_is_better": False, "documents": 4}
            measured["perplexity/c4/loss"] = about
        models.append({"checkpoint": "x", "fingerprint": fingerprint, "limit": None, "measured": measured})
    write_json(folder / "results.json", {"models": models, "compute": {}, "environment": {}})
