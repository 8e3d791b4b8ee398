"""Test whether pruned models are as good as their parent, to within a margin (non-inferiority and equivalence).

Scores are paired by question (or prompt, or window of text) and by seed: an arm's answer to a question minus its own
parent's, with the sign turned where lower is better. The validation loss is paired by seed alone, because runs store
its mean and not its windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.target import DENSE
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.compare.scores import Score, metric_of, unit_of_score
from nemo_pvs.reporting.compare.tasks import ACCURACIES, AVERAGE, accuracies_of, task_scores_of
from nemo_pvs.reporting.compare.verdicts import NonInferiority, Unit
from nemo_pvs.reporting.results import ArmResult
from nemo_pvs.reporting.statistics import MeanEstimate, crossed_estimate, mean_estimate, recovered

PARENT = "parent"
_PER_CENT = 100.0
_OF_PROMPTS = ("repetition", "agreement")
_UNITS: tuple[Unit, ...] = get_args(Unit)

_Pair = tuple[Score, Score]
"""The scores of an arm and of its parent."""


def check_margin(reference: str | None, margin: float | None, unit: str) -> tuple[float, Unit] | None:
    """Return the margin and unit of a requested test of non-inferiority; None if none is requested.

    Raises:
        UserError: a part of it is missing or wrong.
    """
    if reference is None:
        if margin is not None:
            raise UserError(
                "--margin is the largest acceptable shortfall; add what to compare with: --non-inferior-to parent."
            )
        return None
    if reference != PARENT:
        raise UserError(f"--non-inferior-to {reference} is unknown; the only reference is parent.")
    if margin is None:
        raise UserError("--non-inferior-to needs --margin, the largest acceptable shortfall, such as 0.5.")
    if not math.isfinite(margin) or margin <= 0:
        raise UserError(f"--margin {margin:g} is not a valid margin; give a number above 0, such as 0.5.")
    for known in _UNITS:
        if unit == known:
            return margin, known
    raise UserError(f"--unit {unit} is unknown; choose points (of accuracy) or nats (of validation loss).")


def judge_non_inferiority(runs: SideBySide, margin: float, unit: Unit = "points") -> tuple[NonInferiority, ...]:
    """Test every pruned arm against the parent of its run.

    Args:
        runs: The runs.
        margin: The largest acceptable shortfall: percentage points, or nats per token.
        unit: ``points`` tests shares: the accuracy on each task and its average over tasks that are answered by
            choosing, the answers to each task that are written, repetition, distinct n-grams and agreement. ``nats``
            tests the validation loss and the divergence from the parent's predictions.

    Raises:
        UserError: there is no pruned arm, or nothing was measured of an arm and its parent.
    """
    arms = [arm for arm in runs.results.arms if arm.initialisation == "pruned" and arm.method != DENSE]
    if not arms:
        raise UserError("No arm of these runs was pruned, so there is nothing to compare with a parent.")
    tests = []
    for arm in arms:
        tests += [_loss(runs, arm, margin)] if unit == "nats" else []
        tests += _scores(runs, arm, margin, unit)
    if all(test.difference is None for test in tests):
        how = "evaluate.tasks in the recipe, or pvs evaluate with the parent and the models, measures it"
        raise UserError(
            f"No {'validation loss' if unit == 'nats' else 'accuracy'} was measured of both a pruned model and its "
            f"parent; {'give runs that have both' if unit == 'nats' else how}."
        )
    return tuple(tests)


def _loss(runs: SideBySide, arm: ArmResult, margin: float) -> NonInferiority:
    if not runs.results.same_tokens(arm):
        basis = "the arm has another vocabulary than its parent, so their losses per token are not comparable"
        return _non_inferiority(arm, "validation loss", "nats", margin, None, basis)
    differences = []
    for run, repeated in runs.repetitions[arm.name]:
        parent = run.results.parent.validation_loss if run.results.parent else None
        if parent is not None and repeated.validation_loss is not None:
            differences.append(parent - repeated.validation_loss)
    difference = _over_seeds(differences)
    if difference is None:
        basis = "the loss of the arm or of its parent was not measured"
    elif not math.isfinite(difference.mean):
        basis = "a loss is not a finite number, as the training diverged"
    elif difference.count < len(differences):
        basis = "every seed gave the same loss, so the seeds say nothing of its spread"
    elif difference.count == 1:
        basis = "one seed, and the losses of single windows are not stored; report runs with at least two seeds"
    else:
        basis = _seeds(difference)
    return _non_inferiority(arm, "validation loss", "nats", margin, difference, basis)


def _scores(runs: SideBySide, arm: ArmResult, margin: float, unit: Unit) -> list[NonInferiority]:
    """Return the tests of an arm's scores in a unit, with the average of several accuracies first."""
    by_measure: dict[str, list[_Pair]] = {}
    repetitions = runs.repetitions[arm.name]
    for run, repeated in repetitions:
        ours, parents = task_scores_of(run, repeated), run.parent_scores
        for name in _tested([name for name in ours if name in parents], unit):
            by_measure.setdefault(name, []).append((ours[name], parents[name]))
    complete = {name: pairs for name, pairs in by_measure.items() if len(pairs) == len(repetitions)}
    if not complete and unit == "points":
        basis = "the accuracy of the arm or of its parent was not measured with every seed"
        return [_non_inferiority(arm, "accuracy", unit, margin, None, basis)]
    tests = []
    accuracies = accuracies_of(list(complete))
    if len(accuracies) > 1:
        pairs_of_tasks = [complete[name] for name in accuracies]
        tests.append(_of_tasks(arm, f"{AVERAGE} of {len(accuracies)} tasks", pairs_of_tasks, margin, unit))
    for name, pairs in complete.items():
        tests.append(_of_tasks(arm, name, [pairs], margin, unit))
    return tests


def _tested(names: Sequence[str], unit: Unit) -> list[str]:
    """Return the scores that are tested: of a task's accuracies one, and of the divergences that of all positions."""
    accuracies = accuracies_of(names)
    if unit == "nats":
        return [name for name in names if metric_of(name) == "kl"]
    others = [name for name in names if metric_of(name) not in ACCURACIES and unit_of_score(name) == "points"]
    return [*accuracies, *(name for name in others if metric_of(name) != AVERAGE)]


def _of_tasks(
    arm: ArmResult, measure: str, tasks: Sequence[Sequence[_Pair]], margin: float, unit: Unit
) -> NonInferiority:
    """Test the mean score over tasks, by question if all their questions are stored and otherwise by seed."""
    tables = [_by_question(pairs) for pairs in tasks]
    known = [table for table in tables if table is not None]
    if len(known) == len(tables):
        difference = crossed_estimate(known)
        what = "windows" if unit == "nats" else "prompts" if metric_of(measure) in _OF_PROMPTS else "questions"
        basis = f"{sum(table.shape[1] for table in known):,} {what} and {_seeds(difference)}"
    elif any(ours.content != parent.content for pairs in tasks for ours, parent in pairs):
        return _non_inferiority(
            arm, measure, unit, margin, None, "the arm and its parent were asked different questions"
        )
    else:
        differences = [[_sign(ours) * (ours.value - parent.value) for ours, parent in pairs] for pairs in tasks]
        of_seeds = _over_seeds(np.mean(differences, axis=0).tolist())
        assert of_seeds is not None
        difference = of_seeds
        basis = f"{_seeds(difference)}, without single questions, which are not stored for both models"
    factor = _PER_CENT if unit == "points" else 1.0
    scaled = replace(
        difference,
        mean=factor * difference.mean,
        deviation=None if difference.deviation is None else factor * difference.deviation,
        stderr=None if difference.stderr is None else factor * difference.stderr,
    )
    return _non_inferiority(arm, measure, unit, margin, scaled, basis)


def _over_seeds(differences: Sequence[float]) -> MeanEstimate | None:
    """Return the mean over seeds; equal differences are of one model that no seed changed, and count as one."""
    return mean_estimate(differences[:1] if len(set(differences)) == 1 else differences)


def _sign(score: Score) -> int:
    return -1 if score.higher_is_better is False else 1


def _by_question(pairs: Sequence[_Pair]) -> Any:
    """Return differences as (seeds, questions); None unless all models were asked the same questions, and stored."""
    first = pairs[0][0]
    rows = []
    for ours, parent in pairs:
        if ours.by_document is None or parent.by_document is None or first.content is None:
            return None
        if not ours.content == parent.content == first.content or len(ours.by_document) < 2:
            return None
        rows.append(_sign(ours) * np.subtract(ours.by_document, parent.by_document))
    return np.stack(rows)


def _seeds(difference: MeanEstimate) -> str:
    return f"{difference.count} {'seed' if difference.count == 1 else 'seeds'}"


def _non_inferiority(
    arm: ArmResult, measure: str, unit: Unit, margin: float, difference: MeanEstimate | None, basis: str
) -> NonInferiority:
    verdict = "undecided" if difference is None else recovered(difference, margin)
    return NonInferiority(arm.name, measure, unit, margin, difference, verdict, basis)
