"""Runs everything that a recipe stands for: its parents, the sweep of its learning rates, and a run per seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from nemo_pvs.errors import TrainingError, UserError
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.pipeline.folder import check_forced
from nemo_pvs.pipeline.pipeline import Pipeline, write_recipe
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.recipe.identity import identity_without_seeds
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.series import Member, Phase, phases, swept_kinds, with_rates
from nemo_pvs.reporting.compare.compare import RESULTS, compare, read_runs
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.html import write_files, write_report
from nemo_pvs.reporting.results import Results, SweepResult
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.progress import console
from nemo_pvs.training.trainer import Trainer


class RunSeries:
    """The runs of a recipe; for a plain recipe a single one."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        force: Sequence[str] = (),
        compute: Compute = ON_CPU,
        jobs: int | None = None,
    ) -> None:
        """Prepare to run ``recipe`` in ``folder``.

        Args:
            recipe: The recipe.
            folder: The run folder.
            force: Stages to run again, as for ``Pipeline``; applies to everything but the parents.
            compute: Where and how layers run.
            jobs: Number of trainings at the same time, as for ``Trainer``.

        Raises:
            UserError: a forced stage is unknown, or a part of the series is impossible.
        """
        check_forced(force)
        self._recipe = recipe
        self._folder = folder
        self._phases = phases(recipe, folder)
        for first, *_ in self._phases if len(self._phases) > 1 else ():
            dry_run(first.recipe)  # reports a mistake in a later part before parents are trained
        self._force = tuple(force)
        self._compute = compute
        self._jobs = jobs

    def run(self) -> Results:
        """Run what is not done yet, and write the report of every run and of all seeds together.

        Returns:
            What the report of the last phase shows; for several seeds the means.
        """
        with Trainer(self._folder / "train" / "launcher.log", self._jobs) as trainer:
            for phase in self._phases:
                self._say(phase)
                with ExitStack() as locks:
                    pipelines = self._pipelines(phase, locks)
                    if self._jobs is not None:
                        self._train_ahead(pipelines, trainer)
                    for pipeline in pipelines:
                        pipeline.run(trainer)
                        self._report(pipeline)
        return self._together()

    def run_so_far(self) -> Results:
        """Report every arm whose training is finished, and train nothing; the others are named as missing.

        Raises:
            UserError: no arm of the last phase is finished.
        """
        for phase in self._phases:
            with ExitStack() as locks:
                pipelines = self._pipelines(phase, locks)
                if self._is_sweep(phase) and not all(pipeline.is_trained() for pipeline in pipelines):
                    raise UserError(f"The sweep in {phase[0].folder} is not finished; continue pvs run first.")
                pipelines = [pipeline for pipeline in pipelines if pipeline.has_finished_arms()]
                if not pipelines:
                    names = ", ".join(str(member.folder) for member in phase)
                    raise UserError(f"No training in {names} is finished yet; continue pvs run first.")
                for pipeline in pipelines:
                    pipeline.run_so_far()
                    self._report(pipeline)
        return self._together()

    def prepare_only(self) -> list[Path]:
        """Do what comes before the next training, and return the job files of the trainings that can run now.

        Call it again when they are done: parents come first, then the sweep, then the runs of all seeds, and the runs
        of targets that are trained between their stages in several steps.
        """
        for phase in self._phases:
            with ExitStack() as locks:
                pipelines = self._pipelines(phase, locks)
                jobs = [job for pipeline in pipelines for job in pipeline.prepare_only()]
                if phase is self._phases[-1] or not all(pipeline.is_trained() for pipeline in pipelines):
                    return jobs
                for pipeline in pipelines:
                    pipeline.run()
                    self._report(pipeline)
        raise AssertionError("a series has phases")

    def _together(self) -> Results:
        if not self._recipe.seeds:
            return Results.load(self._folder / RESULTS)
        together = compare_seeds(self._phases[-1])
        write_files(together, self._folder)
        (self._folder / RESULTS).unlink(missing_ok=True)  # of a time when the recipe had no seeds
        return together.results

    def _train_ahead(self, pipelines: Sequence[Pipeline], trainer: Trainer) -> None:
        """Train all arms, those of different runs side by side too."""
        while jobs := [job for pipeline in pipelines for job in pipeline.trainable()]:
            trainer.train_all(jobs)

    def _pipelines(self, phase: Phase, locks: ExitStack) -> list[Pipeline]:
        if self._recipe.seeds and phase is self._phases[-1]:
            write_recipe(self._recipe, self._folder)  # by which a report knows which seeds are missing
        pipelines = []
        for member in phase:
            if member.folder != self._folder:  # whose lock the caller holds
                locks.enter_context(locked_folder(member.folder))
            is_parent = self._folder not in (member.folder, *member.folder.parents)
            force = None if is_parent else self._force
            pipelines.append(Pipeline(_with_rates(member), member.folder, force, self._compute, self._jobs))
        return pipelines

    def _report(self, pipeline: Pipeline) -> None:
        member = next(member for phase in self._phases for member in phase if member.folder == pipeline.folder)
        write_report(replace(assemble(pipeline), sweeps=sweeps(member)), pipeline.folder)

    def _say(self, phase: Phase) -> None:
        """Say what follows, if it is one of several things."""
        if len(self._phases) > 1 or len(phase) > 1:
            what = "run" if phase is self._phases[-1] else "learning rates" if self._is_sweep(phase) else "parent"
            names = ", ".join(str(member.folder) for member in phase)
            console.print(Text.assemble((f"{what}{'s' * (len(phase) > 1)}", "bold"), f": {names}"), soft_wrap=True)

    def _is_sweep(self, phase: Phase) -> bool:
        return any(member.sweep == phase[0].folder for later in self._phases for member in later)


def compare_seeds(phase: Phase) -> SideBySide:
    """Put the finished runs of a phase side by side; the others are named as absent."""
    reported = [str(member.folder) for member in phase if _is_reported(member)]
    absent = [str(member.folder) for member in phase if not _is_reported(member)]
    return compare(read_runs(reported), absent=absent)


def _is_reported(member: Member) -> bool:
    """Return whether a run has results of its present recipe, not of one that its folder was used for before."""
    file = member.folder / RESULTS
    if not file.exists():
        return False
    recipe = _with_rates(member).model_dump()
    return identity_without_seeds(Results.load(file).recipe) == identity_without_seeds(recipe)


def _with_rates(member: Member) -> Recipe:
    return with_rates(member.recipe, [chosen.chosen for chosen in sweeps(member)])


def sweeps(member: Member) -> list[SweepResult]:
    """Return the learning rates that the sweep of a run has chosen; empty without one.

    Raises:
        TrainingError: no rate of a kind of arms gave a finite loss.
    """
    if member.sweep is None:
        return []
    results = Results.load(member.sweep / RESULTS)
    chosen = []
    for kind in swept_kinds(member.recipe):
        rates = sorted(kind.sweep.sweep)
        losses: list[float] = []
        tokens = flops = 0
        for rate in rates:
            (arm,) = results.targets[kind.candidate(rate)]
            losses.append(math.nan if arm.validation_loss is None else arm.validation_loss)
            tokens += arm.ledger.training.tokens or 0
            flops += arm.ledger.training.flops or 0
        finite = [(loss, rate) for loss, rate in zip(losses, rates, strict=True) if math.isfinite(loss)]
        if not finite:
            raise TrainingError(
                f"Every learning rate of {kind.name} arms diverged ({member.sweep}); try smaller ones."
            )
        best = min(finite)[1]
        chosen.append(SweepResult(kind.name, kind.target, list(kind.targets), rates, losses, best, tokens, flops))
    return chosen
