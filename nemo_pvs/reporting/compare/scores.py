"""Scores of tasks, as evaluations have written them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json


@dataclass(frozen=True)
class Score:
    """One metric of one model."""

    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool | None
    by_document: tuple[float, ...] | None = None
    """The metric of every question, where it was kept."""
    content: str | None = None
    """The hash of the questions: two models with equal ones were asked the same, in the same order."""
    cut: str | None = None
    """How a text was cut into windows, without which a loss means nothing: ``chunks of 8192``; None for questions."""


TaskScores = dict[str, dict[str, Score]]
"""By the model's fingerprint and by ``arc_easy/0-shot/acc_norm``."""


def read_scores(folder: Path) -> TaskScores:
    """Read the folder of ``pvs evaluate``: ``results.json``, and single questions from ``measured/`` where they are.

    Of a model that was asked all and only the first so many questions of a task, all count.

    Raises:
        UserError: it holds no evaluation.
    """
    data = read_json(folder / "results.json")
    try:
        found: TaskScores = {}
        for model in sorted(data["models"], key=lambda model: model["limit"] or math.inf):
            scores = {name: _score(folder, model, name, about) for name, about in model["measured"].items()}
            for name in {model["fingerprint"], model.get("earlier_fingerprint", model["fingerprint"])}:
                found.setdefault(name, {}).update(scores)
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no evaluation ({error!r}); give the --out folder of pvs evaluate.") from None


def _score(folder: Path, model: Mapping[str, Any], name: str, about: Mapping[str, Any]) -> Score:
    plain = Score(
        about["value"], about["stderr"], about["documents"], about["higher_is_better"], cut=about.get("windows")
    )
    task, _, metric = name.rpartition("/")
    for file in sorted((folder / "measured" / model["fingerprint"][:16]).glob("*.json")):
        kept = read_json(file)
        settings, found = kept["settings"], kept["metrics"].get(metric, {})
        questions = found.get("by_document")
        if (
            kept["name"] == task
            and settings["model"] == model["fingerprint"]
            and settings.get("limit") == model["limit"]
            and found.get("value") == plain.value
            and questions
            and all(isinstance(one, (int, float)) for one in questions)
        ):
            content = f"{settings['task']} {settings['limit']}"
            return replace(plain, by_document=tuple(map(float, questions)), content=content)
    return plain
