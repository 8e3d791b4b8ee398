"""The calibrate stage: importance scores, from one pass over the calibration text for all targets."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.calibration.engine import calibrate as measure_importance
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import ScoresRecord
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.recipe.options import needs_gradients
from nemo_pvs.system.progress import progress


def calibrate(run: RunFolder) -> Stage[ScoresRecord]:
    """Return the stage that measures importance, with gradients where a target needs them."""
    settings, folder = run.recipe.calibrate, _folder(run)
    gradients = any(map(needs_gradients, run.recipe.targets.values()))

    def inputs() -> Inputs:
        return {
            "parent": run.records.parent.fingerprint,
            "text": run.text("calibration"),
            "settings": settings.model_dump(include={"samples", "sequence_length", "seed", "windows"}),
            **({"gradients": True} if gradients else {}),
        }

    def work() -> ScoresRecord:
        tokens = run.calibration_tokens(settings.samples)
        with progress("calibrate", "layers") as show:
            scores = measure_importance(
                run.parent_source, tokens, gradients=gradients, compute=run.compute, progress=show
            )
        scores.save(folder)
        return ScoresRecord(scores.content_hash, tokens.ids.numel())

    return Stage(
        name="calibrate",
        record=ScoresRecord,
        inputs=inputs,
        work=work,
        outputs=[folder],
        after=["parent", "data"],
    )


def load_scores(run: RunFolder) -> Scores:
    """Return the scores that the stage has measured."""
    return Scores.load(_folder(run), run.parent_source)


def _folder(run: RunFolder) -> Path:
    return run.folder / "scores"
