"""``pvs run``: run the stages from a parent to a report in order, each once and resumable."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.pipeline.checks import check_text
from nemo_pvs.pipeline.folder import HUGGING_FACE, RunFolder
from nemo_pvs.pipeline.look_ahead import look_ahead
from nemo_pvs.pipeline.order import initial_weights
from nemo_pvs.pipeline.recipe_tasks import check_questions, check_tasks
from nemo_pvs.pipeline.records import MasksRecord, RecordT, TaughtRecord, prune_stage
from nemo_pvs.pipeline.stage import Stage, TrainingStage
from nemo_pvs.pipeline.stages.data import data
from nemo_pvs.pipeline.stages.evaluate import evaluate, models_to_evaluate
from nemo_pvs.pipeline.stages.learned import learn, learning_job
from nemo_pvs.pipeline.stages.parent import check_parent, parent
from nemo_pvs.pipeline.stages.tasks import TASKS, ask_tasks, say_left_out, say_not_kept
from nemo_pvs.pipeline.stages.teach import teach
from nemo_pvs.pipeline.stages.train import train
from nemo_pvs.pipeline.tokens import Splits
from nemo_pvs.planning.cached_teacher import CachedRange, cached_ranges, teaching_layout
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.dry_run import settled
from nemo_pvs.planning.equal_terms import settle
from nemo_pvs.planning.learned import first_of_each_training
from nemo_pvs.planning.parent_checks import check_costs
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.reporting.compare.compare import RECIPE
from nemo_pvs.system.files import write_text
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.machine import check_here
from nemo_pvs.training.teaching_job import Job, TeachingJob
from nemo_pvs.training.trainer import Trainer, is_finished


class Pipeline(RunFolder):
    """A run folder whose stages can be run."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        force: tuple[str, ...] | None = (),
        compute: Compute = ON_CPU,
        jobs: int | None = None,
    ) -> None:
        """Prepare to run ``recipe`` in ``folder``.

        Args:
            recipe: As for ``RunFolder``.
            folder: As for ``RunFolder``.
            force: As for ``RunFolder``.
            compute: As for ``RunFolder``.
            jobs: Number of trainings that share this machine, as for ``Trainer``.

        Raises:
            UserError: a forced stage is unknown.
        """
        super().__init__(recipe, folder, force, compute)
        self.jobs = jobs

    def run(self, trainer: Trainer | None = None) -> None:
        """Run every stage that is not done yet; use ``trainer`` if it is given."""
        with nullcontext(trainer) if trainer else self._trainer() as running:
            self.prepare(running)
            for stage in self._teaching():
                self.do(stage, running)
            for arm in self.recipe.runs:
                self.do(train(self, arm), running)
        self.evaluate()

    def run_so_far(self) -> None:
        """Measure every arm whose training is finished, and train nothing; ``arms`` are then only these."""
        self._begin(trains_here=False)
        self._make_initial_weights(None)
        self.finished_only = True
        for arm in self.arms:
            self.do(train(self, arm))
        self.evaluate()

    def trainable(self) -> list[Job]:
        """Run every stage that needs no training, and return the jobs that can be run now.

        Run them, in any order or at the same time, and call this again: what they were needed for may have to be
        trained next. It returns none when all are trained; ``run`` then does the rest of each stage.
        """
        self._begin(trains_here=True)
        self._build_index()
        if jobs := self._learning_jobs() or self._make_initial_weights(None) or self._teaching_jobs():
            return jobs
        return [job for arm in self.recipe.runs if (job := self._waits_for(train(self, arm)))]

    def prepare_only(self) -> list[Path]:
        """Run every stage before training, and return the job files for a launcher to run.

        If masks must be learned first, targets are trained between rounds, or a teacher must answer, these are the
        files of those jobs; call this again when they are done.
        """
        self._begin(trains_here=False)
        self._build_index()
        if jobs := self._learning_jobs() or self._make_initial_weights(None) or self._teaching_jobs():
            return [job.file for job in jobs]
        files = []
        for arm in self.recipe.runs:
            stage = train(self, arm)
            self.stages.begin(stage)
            files.append(stage.prepare())
        return files

    def has_finished_arms(self) -> bool:
        """Return whether the training of any arm is finished."""
        return any(is_finished(self.job(arm)) for arm in settled(self.recipe).runs)

    def is_trained(self) -> bool:
        """Return whether the training of every arm is finished."""
        return all(is_finished(self.job(arm)) for arm in self.recipe.runs)

    def prepare(self, trainer: Trainer | None = None) -> None:
        """Run every stage that makes initial weights and token files; use ``trainer`` if it is given."""
        self._begin(trains_here=True)
        self._build_index()
        with nullcontext(trainer) if trainer else self._trainer() as running:
            self._make_initial_weights(running)

    def evaluate(self) -> None:
        """Measure every model, and evaluate those that the report compares on the recipe's tasks."""
        for label, path in models_to_evaluate(self).items():
            self.do(evaluate(self, label, path))
        if self.recipe.evaluate.tasks:
            say_not_kept(self)
            self.do(ask_tasks(self))
            say_left_out(self.recipe.evaluate, self.folder / TASKS)

    def do(self, stage: Stage[Any], trainer: Trainer | None = None) -> Job | None:
        """Run a stage unless it is done.

        Args:
            stage: The stage.
            trainer: Trains the stage's job, if it has one; None if a launcher runs the jobs.

        Returns:
            The job that must be trained before the stage can be completed; None if the stage is done.

        Raises:
            UserError: the stage's work raises it.
        """
        if isinstance(stage, TrainingStage):
            if trainer is None and (job := self._waits_for(stage)):
                return job
            record = self.stages.run(stage, partial(self._train, stage, trainer), partial(_seconds_trained, stage))
        else:
            record = self.stages.run(stage)
        self.records[stage.name] = record
        if stage.then:
            stage.then()
        return None

    def _waits_for(self, stage: TrainingStage[Any]) -> Job | None:
        """Return a stage's job, with its files written, if the stage still needs it to be trained."""
        if not self.stages.begin(stage) or is_finished(stage.job()):
            return None
        stage.prepare()
        return stage.job()

    def _train(self, stage: TrainingStage[RecordT], trainer: Trainer | None) -> RecordT:
        """Train the job of a stage unless it is finished, and do the rest of the stage's work."""
        if not is_finished(stage.job()):
            stage.prepare()
        with nullcontext(trainer) if trainer else self._trainer() as running:
            running.train(stage.job())
        return stage.work()

    def _trainer(self) -> AbstractContextManager[Trainer]:
        return Trainer(self.folder / "train" / "launcher.log", self.jobs)

    def _begin(self, *, trains_here: bool) -> None:
        """Check everything that can be checked, then settle the recipe, the parent and the text.

        Nothing is written before these checks. Only a parent that must be fetched and text that must be tokenised are
        written earlier, as the remaining checks need them.
        """
        stage = parent(self)
        assert stage.known is not None
        known = stage.known()
        if known is None:
            look_ahead(self)
            self.do(stage)
        else:
            self.records["parent"] = known
        check_parent(self)
        self.recipe = settle(self.recipe, self.parent_shape)
        check_costs(self.recipe, self.parent_shape)
        check_tasks(self.recipe)
        self.tokens.check_texts(self.tokenizer, self.parent_shape.vocab)
        if trains_here:
            for job in self._training_jobs():
                if not is_finished(job):
                    check_here(job.name, job.layout, job.training, self.jobs)
            for _, tokens in self._unfinished_caches():
                check_here("The teacher", teaching_layout(self.recipe), tokens.arms[0].training, self.jobs)
        ahead = look_ahead(self)
        if "data" in ahead:
            self._check_text(ahead.data.splits)
        if known is not None:
            self.do(stage)
        write_recipe(self.recipe, self.folder)
        self.do(data(self))
        if "data" not in ahead:
            self._check_text(self.records.data.splits)
            look_ahead(self)

    def _build_index(self, *, retokenised: bool = False) -> None:
        """Build the index of every order in which the jobs read the text; most recipes have one.

        Args:
            retokenised: Of the targets with their own tokens, once these exist; by default of all others.
        """
        orders = {}
        for job in self._training_jobs():
            if (job.data != self.training_data) != retokenised:
                continue
            text = job.data["train"]
            blended = isinstance(text, list) and len(text) > 1  # then the index also depends on how much is read
            budget = (job.first_token, job.training.tokens) if blended else None
            orders[str(text), job.training.sequence_length, job.training.order_seed, budget] = job
        for job in orders.values():
            if not is_finished(job):
                job.build_index()

    def _training_jobs(self) -> list[TrainingJob]:
        """Return the jobs of every training but those between the rounds of a target."""
        learned = [name for name, _ in first_of_each_training(self.recipe)]
        learning = [learning_job(self, name, self.recipe.targets[name]) for name in learned]
        return [*learning, *map(self.job, self.recipe.runs)]

    def _check_text(self, splits: Splits) -> None:
        test, calibration = self.tokens.prefix("test"), self.tokens.prefix("calibration")
        check_text(self.recipe, self.tokens, splits)
        check_questions(self.recipe, test, calibration, self.tokenizer)

    def _teaching_jobs(self) -> list[Job]:
        """Return the unfinished jobs in which a teacher answers."""
        return [job for stage in self._teaching() if (job := self._waits_for(stage))]

    def _teaching(self) -> list[TrainingStage[TaughtRecord]]:
        return [teach(self, number, tokens) for number, tokens in self._unfinished_caches()]

    def _unfinished_caches(self) -> list[tuple[int, CachedRange]]:
        """Return the numbers and tokens of the caches that an arm still reads; others may have been removed."""
        caches = enumerate(cached_ranges(self.recipe), 1)
        return [
            (number, tokens) for number, tokens in caches if not all(is_finished(self.job(arm)) for arm in tokens.arms)
        ]

    def _learning_jobs(self) -> list[Job]:
        """Return the unfinished jobs that learn which parts of the parent to keep."""
        return [job for stage in self._learning() if (job := self._waits_for(stage))]

    def _learning(self) -> list[TrainingStage[MasksRecord]]:
        return [learn(self, name, self.recipe.targets[name]) for name, _ in first_of_each_training(self.recipe)]

    def _make_initial_weights(self, trainer: Trainer | None) -> list[Job]:
        """Make the initial weights of every arm; without a trainer return the jobs that must be run first, if any."""
        waiting = []
        for group in initial_weights(self):
            for stage in group:
                if job := self.do(stage, trainer):
                    waiting.append(job)
                    break
        if waiting:
            return waiting
        # All shapes are known now, including those that scores decided.
        made = [name for name in self.recipe.targets if prune_stage(name) in self.records]
        shapes = {name: shape_of(open_source(self.pruned(name) / HUGGING_FACE)) for name in made}
        self.recipe = settle(self.recipe, self.parent_shape, shapes)
        check_text(self.recipe, self.tokens, self.records.data.splits)
        self._build_index(retokenised=True)
        for name, shape in shapes.items():
            check_training(self.recipe.train, self.recipe.targets[name].layout, shape)
        return []


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the recipe that is run in a folder into it."""
    write_text(folder / RECIPE, yaml.safe_dump(recipe.model_dump(), sort_keys=False))


def _seconds_trained(stage: TrainingStage[Any]) -> float:
    """Return how long the job of a stage has been trained so far; 0 for a teacher, which keeps no such record."""
    job = stage.job()
    if isinstance(job, TeachingJob):
        return 0.0
    return metrics.training_seconds(metrics.read(job.metrics), job.training.tokens_per_step)
