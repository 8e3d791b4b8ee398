"""The stages of a target in ``pvs run``: prune, train a share, prune again; each done once and resumable."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.folder import HUGGING_FACE, NEMO, RunFolder, forget_optimizer
from nemo_pvs.pipeline.look_ahead import LookAhead
from nemo_pvs.pipeline.target import prune_target
from nemo_pvs.planning.charges import charge_scores, charge_training, pruning_charges
from nemo_pvs.planning.rounds import Round, adapt_parameters, shares, stage_targets
from nemo_pvs.recipe.options import ADAPT
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.system.progress import progress
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import Trainer, is_finished, last_checkpoint

_DRAWS = 10_000
"""Seeds between the calibration texts of two stages: more than a stage has iterations."""


def prune_in_stages(run: RunFolder, trainer: Trainer | None, name: str, target: Target) -> Path | None:
    """Prune to a target in stages, with training between them; the last share is that of the arm's own training.

    The result lies where a target's does, with ``charges`` for all that was spent on the way.

    Args:
        run: The run folder.
        trainer: What trains the shares; None where something else starts the ranks.
        name: The target's.
        target: With its stages.

    Returns:
        The job of the first share that something else has to train before it goes on; else None.

    Raises:
        UserError: a stage cannot be reached; those before it stay.
    """
    (arm,) = run.recipe.pruned_runs(name)
    parts = shares(run.recipe, arm)
    before, charges = run.parent_path, list[dict[str, Any]]()
    for number, (asked, _) in enumerate(stage_targets(target, run.parent_shape), 1):
        last = number == len(parts)
        stage, folder = _pruning(run, name, number, last)
        charges = _prune(run, stage, folder, before, target, asked, number, charges)
        if number > 1 and not run.carries(arm, number):
            forget_optimizer(run, name, number - 1)
        if last:
            break
        training = _training(run, arm, number, folder, parts[number - 1])
        inputs = run.training_inputs(arm, parts[number - 1], str(run.results[stage]["fingerprint"]))
        if trainer is None and (waits_for := _unfinished(run, training, inputs)):
            return waits_for
        before = _train(run, trainer, training, inputs)
        charges = [*charges, _charge(parts[number - 1], folder)]
        if run.carries(arm, number):
            forget_optimizer(run, name, number - 1)
    return None


def look_ahead_in_stages(run: RunFolder, ahead: LookAhead, name: str, target: Target) -> None:
    """Look at the stages of a target, the training between them included.

    Raises:
        UserError: what one of them has trained would have to be removed.
    """
    (arm,) = run.recipe.pruned_runs(name)
    parts = shares(run.recipe, arm)
    before, charges, after = run.parent_path, list[dict[str, Any]](), ["parent", "data"]
    for number, (asked, _) in enumerate(stage_targets(target, run.parent_shape), 1):
        last = number == len(parts)
        stage, folder = _pruning(run, name, number, last)

        def inputs(
            before: Path = before, asked: Target = asked, number: int = number, charges: Any = charges
        ) -> dict[str, Any]:
            source = open_source(before)
            asked = _asked(run, shape_of(source), target, asked, number)
            return _pruning_inputs(run, source, target, asked, number, charges)

        ahead.look(stage, inputs, after=after, reads=[before])
        if last:
            return
        training = _training(run, arm, number, folder, parts[number - 1])

        def trained(stage: str = stage, share: Round = parts[number - 1]) -> dict[str, Any]:
            return run.training_inputs(arm, share, str(run.results[stage]["fingerprint"]))

        ahead.look(training.stage, trained, after=[stage], precious=training.kept["precious"])
        before, after = training.model, [stage, training.stage]
        if stage in run.results and folder.exists():
            charges = [*run.results[stage]["charges"], _charge(parts[number - 1], folder)]


def _pruning(run: RunFolder, name: str, number: int, last: bool) -> tuple[str, Path]:
    """Return the name of a stage's pruning, counted from 1, and the folder of what it leaves."""
    if last:
        return f"prune/{name}", run.pruned(name)
    return f"prune/{name}/stage-{number}", run.pruned(f"{name}-stages") / str(number)


def _prune(
    run: RunFolder,
    stage: str,
    folder: Path,
    before: Path,
    target: Target,
    asked: Target,
    number: int,
    charges: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Do one stage's pruning, and return the charges with its own behind them."""
    settings, source = run.recipe.calibrate, open_source(before)
    shape = shape_of(source)
    asked = _asked(run, shape, target, asked, number)
    samples = _samples(run, target)
    inputs = _pruning_inputs(run, source, target, asked, number, charges)

    def draw(iteration: int) -> TokenSet:
        return run.calibration_tokens(samples, number * _DRAWS + iteration)

    def scores() -> Scores:
        with progress("calibrate", "layers") as show:
            return calibrate(source, draw(0), **run.compute, progress=show)

    def no_task() -> Any:
        raise UserError("stages ask no tasks.")

    def work() -> dict[str, Any]:
        made = prune_target(
            asked,
            source,
            folder,
            tokens=lambda: draw(0),
            scores=scores,
            task_score=no_task,
            compute=run.compute,
            draw=draw,
        )
        own = pruning_charges(made, None)
        if target.method == "minitron-width":
            length = settings.sequence_length
            own.append(charge_scores(shape, samples * length, length, gradients=False))
        return {**made, "charges": [*charges, *map(asdict, own)]}

    run.stage(stage, inputs, [folder], work)
    made: list[dict[str, Any]] = run.results[stage]["charges"]
    return made


def _asked(run: RunFolder, shape: Shape, target: Target, asked: Target, number: int) -> Target:
    """Return what a stage asks its method for, now that the shape that it begins with is known."""
    if target.method != ADAPT:
        return asked
    left = adapt_parameters(target, run.parent_shape, number)
    if shape.parameters <= left:  # whole KV groups had gone further than the stage before was to
        return target.model_copy(update={"method": DENSE})
    return target.model_copy(update={"ratio": 1 - left / shape.parameters, "of": "total"})


def _samples(run: RunFolder, target: Target) -> int:
    settings = run.recipe.calibrate
    return settings.scan_samples if target.method == "minitron-depth" else settings.samples


def _pruning_inputs(
    run: RunFolder, source: WeightSource, target: Target, asked: Target, number: int, charges: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what the result of a stage's pruning depends on."""
    settings = run.recipe.calibrate
    return {
        "before": fingerprint(source),
        "method": asked.method,
        "options": asked.options,
        "stage": number,
        "text": [run.text("calibration"), _samples(run, target), settings.sequence_length, settings.seed],
        "charges": charges,
    }


@dataclass(frozen=True)
class _Training:
    """The training behind a stage that is not the last, as a stage of the run."""

    stage: str
    job: TrainingJob
    model: Path
    """Hugging Face folder of what it makes."""

    @property
    def outputs(self) -> list[Path]:
        return [self.job.folder, self.model]

    @property
    def kept(self) -> dict[str, Any]:
        """What is left alone when an attempt is gone on with, and what is never removed unasked."""
        return {"keep_partial": True, "precious": [self.job.checkpoints, self.model]}


def _training(run: RunFolder, arm: Arm, number: int, pruned: Path, share: Round) -> _Training:
    label = f"{arm.target}-stages"
    job = run.share_job(arm, share, f"{arm.name} {number}", Path(label) / str(number), pruned / NEMO, number)
    stage = f"train/{arm.target}/stage-{number}"
    return _Training(stage, job, run.model(label) / str(number))


def _unfinished(run: RunFolder, training: _Training, inputs: dict[str, Any]) -> Path | None:
    """Return the file of the job, for ranks that something else starts, unless they have done it."""
    done = run.stages.begin(training.stage, inputs, training.outputs, **training.kept)
    return None if done or is_finished(training.job) else training.job.save()


def _train(run: RunFolder, trainer: Trainer | None, training: _Training, inputs: dict[str, Any]) -> Path:
    """Train one share, or take it from ranks that have, and return the model's Hugging Face folder."""

    def work() -> dict[str, Any]:
        trained = trainer.train(training.job) if trainer else last_checkpoint(training.job)
        convert(trained, training.model, to="hf", overwrite=True)
        return {"fingerprint": fingerprint(open_source(training.model))}

    run.stage(training.stage, inputs, training.outputs, work, **training.kept)
    return training.model


def _charge(share: Round, pruned: Path) -> dict[str, Any]:
    """Return what the training of a share cost."""
    ledger = Ledger()
    charge_training(ledger, share.training, shape_of(open_source(pruned / HUGGING_FACE)), 0)
    (charge,) = ledger.charges
    return asdict(charge)
