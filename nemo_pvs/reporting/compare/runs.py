"""Finished runs, read to be compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_pvs.recipe.target import DENSE
from nemo_pvs.reporting.compare.scores import TaskScores
from nemo_pvs.reporting.results import ArmResult, Results, at
from nemo_pvs.system.files import sha256_json


@dataclass(frozen=True)
class Run:
    """A finished run."""

    label: str
    """For people: its folder."""
    results: Results
    scores: TaskScores = field(default_factory=dict)
    """Of its models on tasks, by fingerprint."""

    @property
    def seed(self) -> Any:
        """Of the draw of the random weights."""
        return at(self.results.recipe, "train", "seed")

    @property
    def data_seed(self) -> Any:
        """Of the order of the training data."""
        given = at(self.results.recipe, "train", "data_seed")
        return self.seed if given is None else given

    @property
    def identity(self) -> str:
        """Equal for runs that differ in nothing but their seeds.

        A key that is null may as well be absent: an older run does not have the keys that recipes have learned since.
        """
        recipe = {key: value for key, value in self.results.recipe.items() if key not in ("name", "title")}
        if isinstance(train := recipe.get("train"), Mapping):
            recipe["train"] = {key: value for key, value in train.items() if key not in ("seed", "data_seed")}
        return sha256_json(_without_nulls(recipe))


def _without_nulls(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _without_nulls(value) for key, value in values.items() if value is not None}
    return [_without_nulls(value) for value in values] if isinstance(values, (list, tuple)) else values


@dataclass(frozen=True)
class SideBySide:
    """What a report shows: one run, or several whose arms stand side by side."""

    results: Results
    """All arms; one that was repeated with several seeds is the mean of its repetitions."""
    runs: tuple[Run, ...]
    repetitions: Mapping[str, Sequence[tuple[Run, ArmResult]]]
    """What is behind each arm of ``results``, by its name there."""
    differences: tuple[str, ...] = ()
    """What would have made these runs incomparable, had nobody insisted."""

    def loss_deviations(self, arm: ArmResult) -> dict[int, float]:
        """Return the standard deviation of the validation loss over the seeds by tokens; empty for one run."""
        curves = [{point.tokens: point.loss for point in one.validation} for _, one in self.repetitions[arm.name]]
        found = {point.tokens: deviation([curve[point.tokens] for curve in curves]) for point in arm.validation}
        return {tokens: spread for tokens, spread in found.items() if spread is not None}

    def final_loss_deviation(self, arm: ArmResult) -> float | None:
        """Return the standard deviation of the last validation loss over the seeds."""
        found = [one.validation_loss for _, one in self.repetitions[arm.name]]
        return deviation([value for value in found if value is not None])

    def gap_deviation(self, arm: ArmResult) -> float | None:
        """Return the standard deviation of the gap over the seeds, each gap between two arms of one run."""
        gaps = [run.results.gap(one) for run, one in self.repetitions[arm.name]]
        return deviation([gap for gap in gaps if gap is not None])

    def perplexity_deviation(self, arm: ArmResult) -> float | None:
        """Return the standard deviation over the seeds of the test perplexity after training."""
        found = [one.test_perplexity_after for _, one in self.repetitions[arm.name]]
        return deviation([value for value in found if value is not None])

    @property
    def seeds(self) -> int:
        """The most runs that any arm is the mean of."""
        return max((len(runs) for runs in self.repetitions.values()), default=1)

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Target and initial weights (``pruned``, ``random``) of the arms that a comparison needs and nobody ran.

        What no recipe asks for (``arms``) is not among them.
        """
        return [(target, start) for target, start in self._absent if self._asked(target, start)]

    @property
    def _absent(self) -> list[tuple[str, str]]:
        planned = {name for run in self.runs for name in at(run.results.recipe, "targets") or {}}
        targets = {**self.results.targets, **{name: [] for name in sorted(planned - self.results.targets.keys())}}
        return [
            (target, start)
            for target, arms in targets.items()
            if all(arm.method != DENSE for arm in arms) and self._method(target) != DENSE
            for start in ("pruned", "random")
            if all(arm.initialisation != start for arm in arms)
        ]

    def _asked(self, target: str, start: str) -> bool:
        """Whether a recipe asks for an arm; of a target that no recipe knows, both are."""
        asked = [
            at(run.results.recipe, "targets", target, "arms") or at(run.results.recipe, "arms")
            for run in self.runs
            if at(run.results.recipe, "targets", target) is not None
        ]
        return not asked or any(arms is None or start in arms for arms in asked)

    def _method(self, target: str) -> Any:
        return next(
            (found for run in self.runs if (found := at(run.results.recipe, "targets", target, "method"))), None
        )

    @property
    def warnings(self) -> list[str]:
        """Sentences on what a reader must know before believing the numbers."""
        found = [
            f"These runs are not comparable, and were put together all the same: {one}." for one in self.differences
        ]
        for start, words in (("pruned", "the pruned parent"), ("random", "random weights")):
            gone = [target for target, one in self.missing if one == start]
            if gone:
                many = "arms" if len(gone) > 1 else "arm"
                be, it = ("are", "them") if len(gone) > 1 else ("is", "it")
                found.append(f"The {many} from {words} on {_and(gone)} {be} missing: nothing is known of {it}.")
            unasked = [target for target, one in self._absent if one == start and (target, one) not in self.missing]
            if unasked:
                found.append(f"No arm from {words} was asked for on {_and(unasked)}, so there is no gap.")
        for arm in self.results.arms:
            alone = arm.initialisation == "pruned" and not self.results.comparisons(arm)
            if alone and (arm.target, "random") not in self._absent and arm.method != DENSE:
                found.append(f"“{arm.name}” has no counterpart from random weights that cost the same.")
            have = {run.label for run, _ in self.repetitions[arm.name]}
            group = {run.label for run in self.runs if run.identity == self.repetitions[arm.name][0][0].identity}
            if lacking := sorted(group - have):
                found.append(f"“{arm.name}” is missing in {', '.join(lacking)}; its mean is over the other seeds.")
            diverged = next((point for point in arm.validation if not math.isfinite(point.loss)), None)
            if diverged is not None:
                found.append(
                    f"The validation loss of “{arm.name}” is not a finite number after {diverged.tokens:,} tokens: it "
                    "diverged, and such points are left out of the figures."
                )
        return found


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample (n − 1); None for fewer than two values, or if one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)
