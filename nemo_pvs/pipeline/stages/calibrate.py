"""The calibrate stage: importance scores, from one pass over the calibration text for all targets."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.calibration.engine import calibrate as measure_importance
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import CALIBRATE, ScoresRecord
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.recipe.options import needs_gradients, needs_scores
from nemo_pvs.recipe.target import Target
from nemo_pvs.system.progress import progress


def calibrations(run: RunFolder) -> list[Stage[ScoresRecord]]:
    """Return the stages that measure importance for the targets that need it: one, with gradients if any needs them.

    In a folder whose scores were measured without gradients, these are measured separately: the targets that were
    pruned by those scores, and what was trained from them, stay as they are.
    """
    gradients: dict[str, bool] = {}
    for target in run.recipe.targets.values():
        if needs_scores(target):
            name = run.calibration_of(target)
            gradients[name] = gradients.get(name, False) or needs_gradients(target)
    return [_calibrate(run, name, needed) for name, needed in gradients.items()]


def load_scores(run: RunFolder, target: Target) -> Scores:
    """Return the scores that the stage of a target has measured."""
    return Scores.load(_folder(run, run.calibration_of(target)), run.parent_source)


def _calibrate(run: RunFolder, name: str, gradients: bool) -> Stage[ScoresRecord]:
    settings, folder = run.recipe.calibrate, _folder(run, name)

    def inputs() -> Inputs:
        without = {
            "parent": run.records.parent.fingerprint,
            "text": run.text("calibration"),
            "settings": settings.model_dump(include={"samples", "sequence_length", "seed", "windows"}),
        }
        measured = {**without, "gradients": True}
        # Scores with gradients also serve targets that need none: those of a target that was removed are kept.
        return measured if gradients or run.stages.matches(run.stages.begun(name), measured) else without

    def work() -> ScoresRecord:
        tokens = run.calibration_tokens(settings.samples)
        with progress("calibrate", "layers") as show:
            scores = measure_importance(
                run.parent_source, tokens, gradients="gradients" in inputs(), compute=run.compute, progress=show
            )
        scores.save(folder)
        return ScoresRecord(scores.content_hash, tokens.ids.numel())

    return Stage(
        name=name,
        record=ScoresRecord,
        inputs=inputs,
        work=work,
        outputs=[folder],
        after=["parent", "data"],
    )


def _folder(run: RunFolder, name: str) -> Path:
    return run.folder / ("scores" if name == CALIBRATE else "scores-gradients")
