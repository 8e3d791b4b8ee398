"""Put several finished runs side by side: check that they are comparable, and average over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.compare.comparable import differences_of
from nemo_pvs.reporting.compare.findings import judge_findings
from nemo_pvs.reporting.compare.runs import Run, SideBySide, parents_of, side_by_side
from nemo_pvs.reporting.compare.scores import TaskScores, read_scores
from nemo_pvs.reporting.results import ArmResult, ParentResult, Point, Results, at
from nemo_pvs.system.files import read_yaml

RESULTS = "results.json"
RECIPE = "recipe.yaml"
"""In a run folder, the recipe that was run there; in the folder of several seeds, that of all of them."""
EVALUATIONS = ("tasks", "evaluation")
"""Folders in a run folder with scores of its models: those of the recipe's tasks, and those of ``pvs evaluate``."""


def read_runs(folders: Sequence[str], evaluations: Sequence[str] = ()) -> list[Run]:
    """Read run folders, and their scores from ``RUN/tasks``, ``RUN/evaluation`` and further folders.

    Raises:
        UserError: a folder holds no finished run or no evaluation, or is given twice.
    """
    paths = [path for folder in folders for path in seeds_of(Path(folder))]
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise UserError(f"{path} is given twice; give each run once.")
    runs = []
    for path in paths:
        in_run = [path / name for name in EVALUATIONS if (path / name / RESULTS).is_file()]
        scores: TaskScores = {}
        for folder in [*in_run, *map(Path, evaluations)]:
            for model, measured in read_scores(folder).items():
                scores.setdefault(model, {}).update(measured)
        runs.append(Run(str(path), Results.load(path / RESULTS), scores))
    return runs


def seeds_of(folder: Path) -> list[Path]:
    """Return the run folders of the seeds in a folder, in their order; the folder itself if it is a run's."""
    seeds = sorted(folder.glob(f"seed-*/{RESULTS}"), key=lambda file: (len(file.parent.name), file.parent.name))
    return [file.parent for file in seeds] if seeds and not (folder / RESULTS).exists() else [folder]


def seeds_without_results(folder: Path) -> list[str]:
    """Return the run folders of the seeds in a folder that have no results, while others have."""
    if seeds_of(folder) == [folder]:
        return []
    recipe = read_yaml(folder / RECIPE) if (folder / RECIPE).is_file() else None
    seeds = [folder / f"seed-{seed}" for seed in at(recipe, "seeds") or ()]
    begun = [path for path in sorted(folder.glob("seed-*")) if path.is_dir()]
    return [str(path) for path in seeds or begun if not (path / RESULTS).is_file()]


def compare(runs: Sequence[Run], *, absent: Sequence[str] = (), force: bool = False) -> SideBySide:
    """Put runs side by side: repetitions with other seeds are averaged, and equal targets share a panel.

    Arms of one target in different runs are compared, so that pruned and scratch may be separate runs; if two runs
    have the same arm of a target, the target of the later run gets the run's name.

    Args:
        runs: At least one run.
        absent: Folders of runs that belong to them and have no results yet.
        force: Accept runs that are not comparable, and record their differences.

    Raises:
        UserError: they are not comparable (names a field that differs), or one repeats another with the same seed.
    """
    differences = differences_of(runs)
    if differences and not force:
        raise UserError(f"These runs are not comparable: {differences[0]}; leave one out, or pass --force to mark it.")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.identity, []).append(run)
    for group in groups.values():
        for run, other in combinations(group, 2):
            if (run.seed, run.data_seed) == (other.seed, other.data_seed):
                raise UserError(
                    f"{run.label} and {other.label} are one recipe with one seed ({run.seed}), so no spread can come "
                    "from them; give one of them, or run it with another train.seed."
                )
    arms: list[ArmResult] = []
    repetitions: dict[str, list[tuple[Run, ArmResult]]] = {}
    for group in groups.values():
        for arm, repeated in _arms_of(group, {_slot(arm) for arm in arms}, {arm.name for arm in arms}):
            arms.append(arm)
            repetitions[arm.name] = repeated
    first = runs[0].results
    titles = list(dict.fromkeys(run.results.title for run in runs))
    created = max(run.results.created for run in runs)
    merged = replace(first, title="; ".join(titles), arms=arms, created=created, parent=_mean_parent(runs))
    found = SideBySide(merged, tuple(runs), repetitions, tuple(absent), tuple(differences))
    return replace(found, findings=judge_findings(found))


def _mean_parent(runs: Sequence[Run]) -> ParentResult | None:
    """Return the parent; if each seed has its own, the first with the means of what was measured."""
    parents = parents_of(runs)
    if len(parents) < 2:
        return parents[0] if parents else None
    return replace(
        parents[0],
        validation_loss=_mean_known([parent.validation_loss for parent in parents]),
        test_perplexity=_mean_known([parent.test_perplexity for parent in parents]),
        test_bits_per_byte=_mean_known([parent.test_bits_per_byte for parent in parents]),
        text_losses=_mean_losses([parent.text_losses for parent in parents]),
    )


def _arms_of(
    group: list[Run], taken: set[tuple[Any, ...]], names: set[str]
) -> list[tuple[ArmResult, list[tuple[Run, ArmResult]]]]:
    """Return the arms of runs that differ only in their seeds, each with the arms that it is the mean of."""
    collected: dict[str, list[tuple[Run, ArmResult]]] = {}
    for run in group:
        for arm in run.results.arms:
            collected.setdefault(arm.name, []).append((run, arm))
    clashing = {repeated[0][1].target for repeated in collected.values() if _slot(repeated[0][1]) in taken}
    arms = []
    for name, repeated in collected.items():
        arm = _mean([arm for _, arm in repeated])
        if arm.target in clashing or name in names:
            label = group[0].label
            arm = replace(arm, name=f"{name} ({label})")
            if arm.target in clashing:
                arm = replace(arm, target=f"{arm.target} ({label})")
        arms.append((arm, repeated))
    return arms


def _slot(arm: ArmResult) -> tuple[Any, ...]:
    return arm.target, arm.initialisation, arm.ledger.training.tokens


def _mean(arms: list[ArmResult]) -> ArmResult:
    """Return the mean of repetitions, at the token counts that they have in common and at their ends."""
    if len(arms) == 1:
        return arms[0]
    return replace(
        arms[0],
        validation=_mean_points([arm.validation for arm in arms]),
        training=_mean_points([arm.training for arm in arms]),
        test_perplexity_before=_mean_known([arm.test_perplexity_before for arm in arms]),
        test_perplexity_after=_mean_known([arm.test_perplexity_after for arm in arms]),
        test_bits_per_byte_before=_mean_known([arm.test_bits_per_byte_before for arm in arms]),
        test_bits_per_byte_after=_mean_known([arm.test_bits_per_byte_after for arm in arms]),
        text_losses=_mean_losses([arm.text_losses for arm in arms]),
        seconds=_mean_known([arm.seconds for arm in arms]),
        tokens_per_second=_mean_known([arm.tokens_per_second for arm in arms]),
        mfu=_mean_known([arm.mfu for arm in arms]),
        peak_gigabytes=_mean_known([arm.peak_gigabytes for arm in arms]),
    )


def _mean_points(curves: list[list[Point]]) -> list[Point]:
    means = []
    for points in side_by_side(curves):
        means.append(replace(points[0], loss=statistics.fmean(point.loss for point in points)))
    return means


def _mean_losses(losses: list[dict[str, float]]) -> dict[str, float]:
    common = set.intersection(*(set(of_one) for of_one in losses))
    return {name: statistics.fmean(of_one[name] for of_one in losses) for name in losses[0] if name in common}


def _mean_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
