"""A target that is reached in rounds of pruning and training; pruning and training are each a stage of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Charge, Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.folder import HUGGING_FACE, NEMO, RunFolder, forget_optimizer
from nemo_pvs.pipeline.records import PrunedRecord, TrainedRecord, prune_stage, share_stage
from nemo_pvs.pipeline.stage import Inputs, Stage, TrainingStage
from nemo_pvs.pipeline.stages.train import hand_over, training_inputs
from nemo_pvs.pipeline.target import prune_target
from nemo_pvs.planning.charges import charge_scores, charge_training, charges_of_spent
from nemo_pvs.planning.rounds import RoundTraining, adapt_parameters, round_targets, shares
from nemo_pvs.pruning.methods import adapt_pruner
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.system.progress import progress
from nemo_pvs.training.job import CHECKPOINTS, TrainingJob
from nemo_pvs.training.trainer import last_checkpoint

_DRAWS = 10_000
"""Distance between the calibration seeds of two rounds; larger than the iterations of a round."""


def rounds(run: RunFolder, name: str, target: Target) -> Iterator[Stage[Any]]:
    """Yield the stages that lead to a target, without the last share of the training, which is the arm's own stage.

    The record of each pruning has ``charges`` for everything up to and including it.
    """
    (arm,) = run.recipe.pruned_runs(name)
    parts = shares(run.recipe, arm)
    for number in range(1, len(parts) + 1):
        one = _Round(run, arm, target, number, parts)
        yield one.prune()
        if not one.last:
            yield one.train()


@dataclass(frozen=True)
class _Round:
    """One round."""

    run: RunFolder
    arm: Arm
    target: Target
    number: int
    """Counted from 1."""
    parts: list[RoundTraining]
    """The shares of the training of all rounds."""

    @property
    def last(self) -> bool:
        """Whether this round reaches the target."""
        return self.number == len(self.parts)

    @property
    def folder(self) -> Path:
        """The folder of the pruned model."""
        name = self.arm.target
        return self.run.pruned(name) if self.last else self.run.pruned(f"{name}-stages") / str(self.number)

    @property
    def model(self) -> Path:
        """The Hugging Face folder of the trained model."""
        return self.run.model(f"{self.arm.target}-stages") / str(self.number)

    @property
    def previous(self) -> _Round | None:
        """The previous round; None for the first one."""
        if self.number == 1:
            return None
        return _Round(self.run, self.arm, self.target, self.number - 1, self.parts)

    @property
    def before(self) -> Path:
        """The model that this round prunes."""
        return self.previous.model if self.previous else self.run.parent_path

    @property
    def pruning(self) -> str:
        """The name of the stage that prunes."""
        return prune_stage(self.arm.target, None if self.last else self.number)

    @property
    def training(self) -> str:
        """The name of the stage that trains."""
        return share_stage(self.arm.target, self.number)

    def prune(self) -> Stage[PrunedRecord]:
        """Return the stage that prunes the previously trained model."""
        previous = self.previous
        forgets = previous is not None and not self.run.carries(self.arm, self.number)
        return Stage(
            name=self.pruning,
            record=PrunedRecord,
            inputs=self._pruning_inputs,
            work=self._prune,
            outputs=[self.folder],
            after=[previous.pruning, previous.training] if previous else ["parent", "data"],
            reads=[previous.model, previous.folder / HUGGING_FACE] if previous else [],
            then=(lambda: forget_optimizer(self.run, self.arm.target, self.number - 1)) if forgets else None,
        )

    def train(self) -> TrainingStage[TrainedRecord]:
        """Return the stage that trains the pruned model on this round's share."""
        run, arm = self.run, self.arm
        share, folder = self.parts[self.number - 1], run.share_folder(arm.target, self.number)
        forgets = run.carries(arm, self.number)

        def job() -> TrainingJob:
            return run.share_job(arm, share, f"{arm.name} {self.number}", folder, self.folder / NEMO, self.number)

        def inputs() -> Inputs:
            return training_inputs(run, arm, share, self._pruned.fingerprint)

        return TrainingStage(
            name=self.training,
            record=TrainedRecord,
            inputs=inputs,
            job=job,
            prepare=lambda: job().save(),
            work=lambda: TrainedRecord(hand_over(last_checkpoint(job()), self.model)),
            outputs=[folder, self.model],
            after=[self.pruning],
            precious=[folder / CHECKPOINTS, self.model],
            keep_partial=True,
            then=(lambda: forget_optimizer(run, arm.target, self.number - 1)) if forgets else None,
        )

    @property
    def _pruned(self) -> PrunedRecord:
        return self.run.records.pruned(self.arm.target, None if self.last else self.number)

    @property
    def _charges(self) -> tuple[Charge, ...]:
        """The cost of everything before this round, including the training."""
        previous = self.previous
        if previous is None:
            return ()
        assert previous._pruned.charges is not None
        ledger, shape = Ledger(), shape_of(open_source(previous.folder / HUGGING_FACE))
        charge_training(ledger, previous.parts[previous.number - 1].training, shape, 0)
        return (*previous._pruned.charges, *ledger.charges)

    @property
    def _samples(self) -> int:
        settings = self.run.recipe.calibrate
        return settings.scan_samples if self.target.method == "minitron-depth" else settings.samples

    def _asked(self, shape: Shape) -> Target:
        """Return this round's target for the method, given the shape of the model to prune."""
        if self.target.method != adapt_pruner.NAME:
            return round_targets(self.target, self.run.parent_shape)[self.number - 1][0]
        left = adapt_parameters(self.target, self.run.parent_shape, self.number)
        if shape.parameters <= left:  # removing whole KV groups overshot the previous round's target
            return self.target.model_copy(update={"method": DENSE})
        return self.target.model_copy(update={"ratio": 1 - left / shape.parameters, "of": "total"})

    def _pruning_inputs(self) -> Inputs:
        settings, source = self.run.recipe.calibrate, open_source(self.before)
        asked = self._asked(shape_of(source))
        return {
            "before": fingerprint(source),
            "method": asked.method,
            "options": asked.options,
            "stage": self.number,  # the key in records
            "text": [self.run.text("calibration"), self._samples, *settings.identity],
            "charges": [asdict(charge) for charge in self._charges],
        }

    def _prune(self) -> PrunedRecord:
        run, source = self.run, open_source(self.before)
        shape = shape_of(source)

        def draw(iteration: int) -> TokenSet:
            return run.calibration_tokens(self._samples, self.number * _DRAWS + iteration)

        def scores() -> Scores:
            with progress("calibrate", "layers") as show:
                return calibrate(source, draw(0), compute=run.compute, progress=show)

        def no_task() -> Any:
            raise UserError("rounds of pruning cannot choose layers by a task; leave out task, or stages.")

        made = prune_target(
            self._asked(shape),
            source,
            self.folder,
            draw=draw,
            scores=scores,
            task_score=no_task,
            compute=run.compute,
        )
        charges = charges_of_spent(made.calibration, made.search, None)
        if self.target.method == "minitron-width":
            length = run.recipe.calibrate.sequence_length
            charges.append(charge_scores(shape, self._samples * length, length, gradients=False))
        return replace(made, charges=(*self._charges, *charges))
