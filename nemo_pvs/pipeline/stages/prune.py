"""The prune stage: a target made from the parent, as a Hugging Face folder and a NeMo checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import PrunedRecord, masks_stage, prune_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.pipeline.stages.calibrate import load_scores
from nemo_pvs.pipeline.stages.learned import prune_by_learning
from nemo_pvs.pipeline.stages.tasks import reads_text, search_score
from nemo_pvs.pipeline.target import prune_target, write_planned
from nemo_pvs.planning.learned import is_trained_first
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.pruning.request import TaskScorer
from nemo_pvs.recipe.options import ADAPT, is_sparse, needs_scores, scans
from nemo_pvs.recipe.target import Target


def prune(run: RunFolder, name: str, target: Target) -> Stage[PrunedRecord]:
    """Return the stage that prunes to a target which is not reached in stages of its own (``stages.rounds``)."""
    settings, folder = run.recipe.calibrate, run.pruned(name)
    samples = settings.scan_samples if scans(target) else settings.samples

    def inputs() -> Inputs:
        text = []
        if scans(target) or is_sparse(target) or reads_text(target) or target.method == ADAPT:
            text = [run.text("calibration"), samples, settings.sequence_length, settings.seed]
        return {
            "parent": run.records.parent.fingerprint,
            "method": target.method,
            "options": target.options,
            "shape": expected_shape(target, run.parent_shape).shape.to_dict(),
            "scores": run.records.scores.scores if needs_scores(target) else None,
            "text": text,
            **({"masks": run.records.masks(name).masks} if is_trained_first(target) else {}),
        }

    def work() -> PrunedRecord:
        if is_trained_first(target):
            return PrunedRecord.from_json(write_planned(*prune_by_learning(run, name, target), folder))
        questions = run.folder / "questions" / name
        return prune_to(
            run,
            target,
            run.parent_source,
            folder,
            draw=lambda iteration: run.calibration_tokens(samples, iteration),
            scores=lambda: load_scores(run),
            task_score=lambda: search_score(
                target, run.tokens.prefix("calibration"), run.tokenizer, questions, run.compute
            ),
        )

    after = ["parent", "data"]
    if needs_scores(target):
        after.append("calibrate")
    if is_trained_first(target):
        after.append(masks_stage(name))
    return Stage(
        name=prune_stage(name),
        record=PrunedRecord,
        inputs=inputs,
        work=work,
        outputs=[folder],
        after=after,
        shared=True,
    )


def prune_to(
    run: RunFolder,
    target: Target,
    source: WeightSource,
    folder: Path,
    *,
    draw: Callable[[int], TokenSet],
    scores: Callable[[], Scores],
    task_score: Callable[[], TaskScorer],
) -> PrunedRecord:
    """Prune a model into ``folder`` by the method of a target.

    Args:
        run: The run folder.
        target: Method and amount.
        source: The model.
        folder: Is made.
        draw: Draws the calibration text of an iteration; methods without iterations read that of 0.
        scores: Loads or measures the scores.
        task_score: Returns what measures models by the target's task.

    Raises:
        UserError: the model cannot be pruned like that.
    """
    made = prune_target(
        target,
        source,
        folder,
        tokens=lambda: draw(0),
        scores=scores,
        task_score=task_score,
        compute=run.compute,
        draw=draw,
    )
    return PrunedRecord.from_json(made)
