"""Read scores on tasks from evaluations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.compare.verdicts import Unit
from nemo_pvs.system.files import read_json


@dataclass(frozen=True)
class Score:
    """One metric of one model."""

    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool | None
    by_document: tuple[float, ...] | None = None
    """The metric for every question, if it was stored and ``value`` is its mean."""
    content: str | None = None
    """Identifies the questions: models with equal values were asked the same questions in the same order."""
    cut: str | None = None
    """How a text was split into windows, on which a loss depends: ``chunks of 8192``; None for questions."""
    seeds: tuple[Score, ...] = ()
    """The scores that it is the mean of, one for each seed; empty for the score of one model."""

    @property
    def by_seed(self) -> tuple[Score, ...]:
        """The scores of the single models."""
        return self.seeds or (self,)


_SHARES = ("acc", "average", "exact_match", "f1", "repetition", "distinct", "agreement")
_NATS = ("loss", "kl")


def metric_of(name: str) -> str:
    """Return the metric in the name of a score, without lm-eval's filter: ``exact_match`` of gsm8k's."""
    return name.rpartition("/")[2].partition(",")[0]


def unit_of_score(name: str) -> Unit | None:
    """Return the unit in which a score is compared: ``points`` for shares, ``nats`` for losses; None for others."""
    metric = metric_of(name)
    if metric.startswith(_SHARES) or metric.endswith("_acc"):
        return "points"
    return "nats" if metric.startswith(_NATS) else None


TaskScores = dict[str, dict[str, Score]]
"""Scores by the model's fingerprint and by metric, e.g. ``arc_easy/0-shot/acc_norm``."""


def read_scores(folder: Path) -> TaskScores:
    """Read a folder of ``pvs evaluate``: ``results.json``, and single questions from ``measured/`` if stored.

    If a model was evaluated on a task with several limits on the number of questions, the largest limit counts, and
    of several evaluations with that limit the last one, which comes first in the file.

    Raises:
        UserError: the folder holds no evaluation.
    """
    data = read_json(folder / "results.json")
    try:
        by_model: TaskScores = {}
        newest_last = data["models"][::-1]
        for model in sorted(newest_last, key=lambda model: model["limit"] or math.inf):
            scores = {name: _score(folder, model, name, metric) for name, metric in model["measured"].items()}
            by_model.setdefault(model["fingerprint"], {}).update(scores)
        return by_model
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no evaluation ({error!r}); give the --out folder of pvs evaluate.") from None


def _score(folder: Path, model: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> Score:
    plain = Score(
        entry["value"], entry["stderr"], entry["documents"], entry["higher_is_better"], cut=entry.get("windows")
    )
    task, _, metric = name.rpartition("/")
    for file in sorted((folder / "measured" / model["fingerprint"][:16]).glob("*.json")):
        record = read_json(file)
        settings, measured = record["settings"], record["metrics"].get(metric, {})
        questions = measured.get("by_document")
        if (
            record["name"] == task
            and settings["model"] == model["fingerprint"]
            and settings.get("limit") == model["limit"]
            and measured.get("value") == plain.value
            and questions
            and all(isinstance(value, (int, float)) for value in questions)
            # Not so for a perplexity, whose questions have log-likelihoods: their spread is not its error.
            and math.isclose(statistics.fmean(questions), plain.value, rel_tol=1e-6, abs_tol=1e-9)
        ):
            content = f"{settings['task']} {settings['limit']}"
            return replace(plain, by_document=tuple(map(float, questions)), content=content)
    return plain
