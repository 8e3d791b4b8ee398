"""The prune stage: prune the parent to a target, as a Hugging Face folder and a NeMo checkpoint."""

from __future__ import annotations

from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.recipe_tasks import reads_text, search_score
from nemo_pvs.pipeline.records import PrunedRecord, masks_stage, prune_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.pipeline.stages.calibrate import load_scores
from nemo_pvs.pipeline.stages.learned import prune_by_learning
from nemo_pvs.pipeline.target import prune_target, write_planned
from nemo_pvs.planning.learned import is_trained_first
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.pruning.methods import minitron_depth, vocabulary
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.recipe.options import is_sparse, needs_scores, scans, vocabulary_of
from nemo_pvs.recipe.target import DENSE, Target


def prune(run: RunFolder, name: str, target: Target) -> Stage[PrunedRecord]:
    """Return the stage that prunes to a target at once; ``stages.rounds`` has targets that are pruned in rounds."""
    settings, folder = run.recipe.calibrate, run.pruned(name)
    samples = settings.scan_samples if scans(target) else settings.samples
    calibration = run.calibration_of(target)

    def inputs() -> Inputs:
        text = []
        if scans(target) or is_sparse(target) or reads_text(target) or _reads_itself(target):
            text = [run.text("calibration"), samples, *settings.identity]
        return {
            "parent": run.records.parent.fingerprint,
            "method": target.method,
            "options": target.options,
            "shape": expected_shape(target, run.parent_shape).shape.to_dict(),
            "scores": run.records.scores(calibration).scores if needs_scores(target) else None,
            "text": text,
            **({"masks": run.records.masks(name).masks} if is_trained_first(target) else {}),
            **({"counted": run.text("train")} if vocabulary_of(target) is not None else {}),
        }

    def work() -> PrunedRecord:
        if is_trained_first(target):
            return write_planned(*prune_by_learning(run, name, target), folder)
        questions = run.folder / "questions" / name
        return prune_target(
            target,
            run.parent_source,
            folder,
            draw=lambda iteration: run.calibration_tokens(samples, iteration),
            scores=lambda: load_scores(run, target),
            task_score=lambda: search_score(
                target, run.tokens.prefix("calibration"), run.tokenizer, questions, run.compute
            ),
            token_counts=lambda: run.tokens.token_counts(run.parent_shape.vocab),
            compute=run.compute,
        )

    after = ["parent", "data"]
    if needs_scores(target):
        after.append(calibration)
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


def _reads_itself(target: Target) -> bool:
    """Return whether a target's method reads the calibration text, not only scores that were measured on it.

    What the depth method reads its ``search`` and ``task`` say, and the vocabulary is counted in the training text.
    """
    if target.method in (DENSE, minitron_depth.NAME, vocabulary.NAME):
        return False
    method = method_named(target.method)
    return method.reads_text and not method.scored
