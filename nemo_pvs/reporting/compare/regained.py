"""What a pruned model regains of its parent while it is trained: every measure relative to the parent's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_pvs.reporting.compare.runs import Run, SideBySide
from nemo_pvs.reporting.compare.scores import Score, metric_of, unit_of_score
from nemo_pvs.reporting.compare.tasks import ACCURACIES, accuracies_of, task_scores_of
from nemo_pvs.reporting.compare.verdicts import Unit
from nemo_pvs.reporting.results import ArmResult

VALIDATION_LOSS = "validation loss"


@dataclass(frozen=True)
class Regained:
    """One measure of a pruned arm along its training, as means over seeds."""

    arm: str
    measure: str
    """A score's name, or ``validation loss``."""
    unit: Unit
    higher_is_better: bool
    parent: float
    points: tuple[tuple[int, float], ...]
    """Training tokens and value."""

    def share(self, value: float) -> float | None:
        """Return a value relative to the parent's, 1 where they are equal and larger where the model is better.

        A share that is better when higher is divided by the parent's, and of one that is better when lower, such as
        repetition, the rest to 1 is. Losses and divergences in nats are exponents: exp(parent - model), the ratio of
        the probabilities that both give to a token (a geometric mean). None if the parent's share is 0.
        """
        if self.unit == "nats":
            return math.exp(self.parent - value)
        ours, parents = (value, self.parent) if self.higher_is_better else (1 - value, 1 - self.parent)
        return ours / parents if parents else None


def regained(runs: SideBySide) -> list[Regained]:
    """Return the measures of every arm that was evaluated before or during its training as well.

    A measure is there if it was taken of the parent and at several points; losses per token only if the arm has the
    parent's tokens.
    """
    found = []
    for arm in runs.results.arms:
        repetitions = runs.repetitions[arm.name]
        if not all(repeated.before_the_end for _, repeated in repetitions):
            continue
        if runs.results.same_tokens(arm) and (losses := _losses(arm.name, repetitions)):
            found.append(losses)
        found += _scores(arm.name, repetitions)
    return found


def _losses(name: str, repetitions: Sequence[tuple[Run, ArmResult]]) -> Regained | None:
    parents = [run.results.parent for run, _ in repetitions]
    known = [parent.validation_loss for parent in parents if parent and parent.validation_loss is not None]
    curves = [{point.tokens: point.loss for point in arm.validation} for _, arm in repetitions]
    points = []
    for tokens in sorted(set.intersection(*map(set, curves))):
        loss = statistics.fmean(curve[tokens] for curve in curves)
        if math.isfinite(loss):
            points.append((tokens, loss))
    if len(known) < len(parents) or len(points) < 2:
        return None
    return Regained(name, VALIDATION_LOSS, "nats", False, statistics.fmean(known), tuple(points))


def _scores(name: str, repetitions: Sequence[tuple[Run, ArmResult]]) -> list[Regained]:
    along = [_along(run, arm) for run, arm in repetitions]
    common = sorted(set.intersection(*map(set, along)))
    measures = _measures([run.parent_scores for run, _ in repetitions])
    found = []
    for measure in measures:
        parents = [run.parent_scores[measure] for run, _ in repetitions]
        points = []
        for tokens in common:
            scores = [by_tokens[tokens][measure] for by_tokens in along if measure in by_tokens[tokens]]
            if len(scores) == len(along) and all(score.cut == parents[0].cut for score in scores):
                points.append((tokens, statistics.fmean(score.value for score in scores)))
        unit = unit_of_score(measure)
        if unit and len(points) > 1:
            parent = statistics.fmean(score.value for score in parents)
            found.append(
                Regained(name, measure, unit, parents[0].higher_is_better is not False, parent, tuple(points))
            )
    return found


def _along(run: Run, arm: ArmResult) -> dict[int, dict[str, Score]]:
    """Return the scores of an arm's models by the tokens that they had been trained on."""
    along = {tokens: run.scores.get(model, {}) for tokens, model in arm.before_the_end.items()}
    end = max((point.tokens for point in arm.validation), default=arm.ledger.training.tokens or 0)
    return {**along, end: task_scores_of(run, arm)}


def _measures(parents: Sequence[dict[str, Score]]) -> list[str]:
    """Return the names that all parents have, of accuracies one for each task."""
    names = [name for name in parents[0] if all(name in scores for scores in parents)]
    chosen = set(accuracies_of(names))
    return [name for name in names if name in chosen or metric_of(name) not in ACCURACIES]
