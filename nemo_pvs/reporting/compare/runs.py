"""Finished runs, and what a report shows of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_pvs.recipe.identity import identity_without_seeds
from nemo_pvs.recipe.target import DENSE
from nemo_pvs.reporting.compare.scores import Score, TaskScores
from nemo_pvs.reporting.compare.verdicts import NonInferiority, PaperFinding
from nemo_pvs.reporting.numbers import and_list
from nemo_pvs.reporting.results import ArmResult, ParentResult, Point, Results, at
from nemo_pvs.reporting.statistics import mean_estimate

_LISTED = 6
"""Arms that are listed by name; of more only the number is said."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    label: str
    """Its folder, for display."""
    results: Results
    scores: TaskScores = field(default_factory=dict)
    """Scores of its models on tasks, by fingerprint."""

    @property
    def seed(self) -> Any:
        """Seed of the random weights."""
        return at(self.results.recipe, "train", "seed")

    @property
    def data_seed(self) -> Any:
        """Seed of the order of the training data."""
        given = at(self.results.recipe, "train", "data_seed")
        return self.seed if given is None else given

    @property
    def parent_scores(self) -> dict[str, Score]:
        """Scores of the parent on tasks, by metric."""
        return self.scores.get(self.results.hashes.get("parent weights", ""), {})

    @property
    def identity(self) -> str:
        """A hash that is equal for runs that differ only in their seeds and those of their parents."""
        return identity_without_seeds(self.results.recipe, self.results.parent_origin)


def parents_of(runs: Sequence[Run]) -> list[ParentResult]:
    """Return the parents of runs, each once: one that all share, or one for each seed."""
    parents: dict[str, ParentResult] = {}
    for run in runs:
        parent = run.results.parent
        if parent is not None:
            parents.setdefault(run.results.hashes.get("parent weights") or repr(parent), parent)
    return list(parents.values())


def side_by_side(curves: Sequence[Sequence[Point]]) -> list[tuple[Point, ...]]:
    """Return the points of repeated trainings that belong together: those after the same tokens, and all last ones.

    The ends are at different tokens where a budget in FLOPs follows from a shape that each seed's scores decide.
    """
    by_tokens = [{point.tokens: point for point in curve} for curve in curves]
    common = [tokens for tokens in by_tokens[0] if all(tokens in curve for curve in by_tokens)]
    together = [tuple(curve[tokens] for curve in by_tokens) for tokens in common]
    if all(curves):
        ends = tuple(curve[-1] for curve in curves)
        together = [*(points for points in together if points[0] is not ends[0]), ends]
    return together


@dataclass(frozen=True)
class SideBySide:
    """The content of a report: one run, or several with their arms side by side."""

    results: Results
    """All arms; one that was repeated with several seeds is the mean of its repetitions."""
    runs: tuple[Run, ...]
    repetitions: Mapping[str, Sequence[tuple[Run, ArmResult]]]
    """The runs and arms that each arm of ``results`` is the mean of, by its name there."""
    absent: tuple[str, ...] = ()
    """Folders of runs that belong here and have no results yet, such as those of further seeds."""
    differences: tuple[str, ...] = ()
    """Differences that make these runs incomparable, if the comparison was forced."""
    findings: tuple[PaperFinding, ...] = ()
    """The paper's findings, judged by these runs."""
    recoveries: tuple[NonInferiority, ...] = ()
    """Tests whether pruned arms are as good as their parent, if they were asked for."""

    def loss_deviations(self, arm: ArmResult) -> dict[int, float]:
        """Return the standard deviation of the validation loss over seeds, by tokens; empty for one run."""
        deviations = {}
        for points in side_by_side([repeated.validation for _, repeated in self.repetitions[arm.name]]):
            over_seeds = mean_estimate([point.loss for point in points])
            if over_seeds is not None and over_seeds.deviation is not None:
                deviations[points[0].tokens] = over_seeds.deviation
        return deviations

    @property
    def seeds(self) -> int:
        """The largest number of runs that an arm is the mean of."""
        return max((len(runs) for runs in self.repetitions.values()), default=1)

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Target and initial weights (``pruned``, ``random``) of arms that a recipe requests but no run has.

        Arms that no recipe requests (``arms``) are not included.
        """
        return [(target, start) for target, start in self._absent if self._requested(target, start)]

    @property
    def _absent(self) -> list[tuple[str, str]]:
        """Target and initial weights of all arms that no run has, requested or not."""
        planned: set[str] = set()
        for run in self.runs:
            planned.update(at(run.results.recipe, "targets") or {})
        targets = {**self.results.targets, **{name: [] for name in sorted(planned - self.results.targets.keys())}}
        absent = []
        for target, arms in targets.items():
            if self._method(target) == DENSE or any(arm.method == DENSE for arm in arms):
                continue
            for start in ("pruned", "random"):
                if all(arm.initialisation != start for arm in arms):
                    absent.append((target, start))
        return absent

    def _requested(self, target: str, start: str) -> bool:
        """Whether a recipe requests an arm; true if no recipe has the target."""
        plans = self._plans(target)
        return not plans or any(_trains(recipe, plan, start) for recipe, plan in plans)

    def _method(self, target: str) -> Any:
        return next(filter(None, (at(plan, "method") for _, plan in self._plans(target))), None)

    def _plans(self, target: str) -> list[tuple[Any, Any]]:
        """Return the recipes that have a target, and what each says of it.

        These are the recipes of the runs whose arms it holds, where it may have had another name, and of the runs that
        have none of its arms.
        """
        names = {}
        for arm in self.results.targets.get(target, []):
            names.update({run.label: original.target for run, original in self.repetitions[arm.name]})
        plans = []
        for run in self.runs:
            elsewhere = run.label not in names and target in run.results.targets
            plan = None if elsewhere else at(run.results.recipe, "targets", names.get(run.label, target))
            if plan is not None:
                plans.append((run.results.recipe, plan))
        return plans

    @property
    def not_trained(self) -> list[str]:
        """What the recipes ask for and these runs have not trained yet."""
        missing = []
        for run in self.runs:
            names = [f"“{name}”" for name in run.results.unfinished]
            if names:
                arms = and_list(names) if len(names) <= _LISTED else f"{len(names)} arms"
                missing.append(f"{arms} in {run.label}, not trained yet")
        return [*missing, *(f"all of {folder}, not trained yet" for folder in self.absent)]

    @property
    def warnings(self) -> list[str]:
        """Caveats that a reader must know, one sentence each."""
        warnings = []
        for difference in self.differences:
            warnings.append(f"These runs are not comparable, but were put side by side anyway: {difference}.")
        warnings += [f"Missing here: {lacking}." for lacking in self.not_trained]
        for start, words in (("pruned", "the pruned parent"), ("random", "random weights")):
            missing = [target for target, weights in self.missing if weights == start]
            if missing:
                many = "arms" if len(missing) > 1 else "arm"
                be, it = ("are", "them") if len(missing) > 1 else ("is", "it")
                warnings.append(
                    f"The {many} from {words} on {and_list(missing)} {be} missing: nothing is known of {it}."
                )
            absent = [target for target, weights in self._absent if weights == start]
            unrequested = [target for target in absent if target not in missing]
            if unrequested:
                warnings.append(f"No arm from {words} was asked for on {and_list(unrequested)}, so there is no gap.")
        for arm in self.results.arms:
            alone = arm.initialisation == "pruned" and not self.results.comparisons(arm)
            if alone and (arm.target, "random") not in self._absent and arm.method != DENSE:
                warnings.append(f"“{arm.name}” has no counterpart from random weights that cost the same.")
            have = {run.label for run, _ in self.repetitions[arm.name]}
            group = {run.label for run in self.runs if run.identity == self.repetitions[arm.name][0][0].identity}
            if lacking := sorted(group - have):
                warnings.append(f"“{arm.name}” is missing in {', '.join(lacking)}; its mean is over the other seeds.")
            diverged = next((point for point in arm.validation if not math.isfinite(point.loss)), None)
            if diverged is not None:
                warnings.append(
                    f"The validation loss of “{arm.name}” is not a finite number after {diverged.tokens:,} tokens: it "
                    "diverged, and such points are left out of the figures."
                )
        return warnings


def _trains(recipe: Any, target: Any, start: str) -> bool:
    """Whether a recipe trains a target's arms from these initial weights, and has a budget for them."""
    arms, budgets = at(target, "arms") or at(recipe, "arms"), at(recipe, "budgets")
    without = isinstance(budgets, Mapping) and not budgets.get(start)
    return (arms is None or start in arms) and not without
