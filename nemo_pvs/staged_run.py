"""The stages of a target in ``pvs run``: prune, train a share, prune again; each done once and resumable."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.tokens import TokenSet
from nemo_pvs.checkpoint_ledger import charge_scores, charge_training, pruning_charges
from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.source import fingerprint, shape_of
from nemo_pvs.checkpoints.stream import convert
from nemo_pvs.errors import UserError
from nemo_pvs.progress import progress
from nemo_pvs.prune_target import HUGGING_FACE, NEMO, prune_target
from nemo_pvs.recipe import Target
from nemo_pvs.recipe_blocks import DENSE
from nemo_pvs.reporting.ledger import Ledger
from nemo_pvs.run_folder import RunFolder
from nemo_pvs.staged import ADAPT, Share, adapt_parameters, shares, stage_targets
from nemo_pvs.training.run import Trainer

_DRAWS = 10_000
"""Seeds between the calibration texts of two stages: more than a stage has iterations."""


def prune_in_stages(run: RunFolder, trainer: Trainer | None, name: str, target: Target) -> None:
    """Prune to a target in stages, with training between them; the last share is that of the arm's own training.

    The result lies where a target's does, with ``charges`` for all that was spent on the way.

    Raises:
        UserError: ranks are started by something else, or a stage cannot be reached; those before it stay.
    """
    if trainer is None:
        raise UserError(
            f"Target {name} is trained between its stages, so its ranks cannot be started by something else; run it "
            "without --prepare-only."
        )
    (arm,) = run.recipe.pruned_runs(name)
    parts = shares(run.recipe, arm)
    before, charges = run.parent_path, list[dict[str, Any]]()
    for number, (asked, _) in enumerate(stage_targets(target, run.parent_shape), 1):
        last = number == len(parts)
        folder = run.pruned(name) if last else run.pruned(f"{name}-stages") / str(number)
        stage = f"prune/{name}" if last else f"prune/{name}/stage-{number}"
        charges = _prune(run, stage, folder, before, target, asked, number, charges)
        if not last:
            initial = str(run.results[stage]["fingerprint"])
            before, spent = _train(run, trainer, name, number, folder, initial, parts[number - 1])
            charges = [*charges, spent]
        if number > 1 and not run.carries(arm, number):
            forget_optimizer(run, name, number - 1)


def forget_optimizer(run: RunFolder, name: str, number: int) -> None:
    """Remove what only going on with a share of training would need, its checkpoints; its weights are kept."""
    shutil.rmtree(run.share_folder(name, number) / "nemo", ignore_errors=True)


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
    if target.method == ADAPT:
        left = adapt_parameters(target, run.parent_shape, number)
        asked = target.model_copy(update={"ratio": 1 - left / shape.parameters, "of": "total"})
        if shape.parameters <= left:  # whole KV groups had gone further than the stage before was to
            asked = target.model_copy(update={"method": DENSE})
    samples = settings.scan_samples if target.method == "minitron-depth" else settings.samples
    inputs = {
        "before": fingerprint(source),
        "method": asked.method,
        "options": asked.options,
        "stage": number,
        "text": [run.text("calibration"), samples, settings.sequence_length, settings.seed],
        "charges": charges,
    }

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


def _train(
    run: RunFolder, trainer: Trainer, name: str, number: int, pruned: Path, initial: str, share: Share
) -> tuple[Path, dict[str, Any]]:
    """Train one share, and return the model's Hugging Face folder and what it cost."""
    (arm,) = run.recipe.pruned_runs(name)
    label = f"{name}-stages"
    job = run.share_job(arm, share, f"{arm.name} {number}", Path(label) / str(number), pruned / NEMO, number)
    model = run.model(label) / str(number)

    def work() -> dict[str, Any]:
        convert(trainer.train(job), model, to="hf", overwrite=True)
        return {"fingerprint": fingerprint(open_source(model))}

    inputs = run.training_inputs(arm, share, initial)
    precious = [job.checkpoints, model]
    run.stage(f"train/{name}/stage-{number}", inputs, [job.folder, model], work, keep_partial=True, precious=precious)
    if run.carries(arm, number):
        forget_optimizer(run, name, number - 1)
    ledger = Ledger()
    charge_training(ledger, share.training, shape_of(open_source(pruned / HUGGING_FACE)), 0)
    (charge,) = ledger.charges
    return model, asdict(charge)
