"""All stages of a run looked at before the first is done: which results are known, and what would be refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.pipeline.folder import HUGGING_FACE
from nemo_pvs.pipeline.look_ahead import LookAhead
from nemo_pvs.pipeline.stages.parent import known_parent, parent_inputs
from nemo_pvs.pipeline.stages.rounds import look_ahead_in_stages
from nemo_pvs.planning.equal_terms import settle
from nemo_pvs.planning.learned import is_trained_first
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.recipe.options import is_sparse, needs_scores, stages_of
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.training.job import CHECKPOINTS

if TYPE_CHECKING:
    from nemo_pvs.pipeline.pipeline import Pipeline


def look_ahead(run: Pipeline) -> dict[str, dict[str, Any]]:
    """Refuse what a stage of a run would refuse after others have been done; nothing is written.

    Returns:
        The results of the stages that will find the same as before, and of those that need no work.

    Raises:
        UserError: something that took long to make would have to be removed.
    """
    kept, run.results = run.results, {}
    try:
        _look(run, LookAhead(run.stages, run.results))
        return run.results
    finally:
        run.results = kept


def _look(run: Pipeline, ahead: LookAhead) -> None:
    if (parent := known_parent(run)) is not None:
        run.results["parent"] = parent
        _look_at_data(run, ahead)
    else:
        ahead.look("parent", partial(parent_inputs, run))
    if any(needs_scores(target) for target in run.recipe.targets.values()):
        ahead.look("calibrate", run.calibration_inputs, after=["parent", "data"])
    for name, target in run.recipe.targets.items():
        _look_at_target(run, ahead, name, target)
    for arm in _arms(run):
        made = f"{'prune' if arm.takes_parent else 'random'}/{arm.target}"
        inputs = partial(run.arm_inputs, arm)
        ahead.look(f"train/{arm.name}", inputs, after=["data", made], precious=run.precious(arm))


def _look_at_data(run: Pipeline, ahead: LookAhead) -> None:
    """Look at the text: token files are there already, other text is what it was if its files are."""
    if run.recipe.data.token_files is None:
        ahead.look("data", run.data_inputs, decisive=_of_text)
        return
    splits = run.tokens.identity(run.tokenizer, run.parent_shape.vocab)
    run.results["data"] = {"splits": splits, "validation_windows": run.tokens.validation_windows.manifest}


def _of_text(inputs: Mapping[str, Any]) -> Any:
    """Return what makes other tokens for certain: not where the files are, nor when they were written."""
    sizes = [size for size, _ in inputs["files"].values()]
    return [sizes, inputs["source"]["split"], inputs["source"]["seed"], inputs["tokenizer"], inputs["validation"]]


def _look_at_target(run: Pipeline, ahead: LookAhead, name: str, target: Target) -> None:
    if stages_of(target) > 1:
        if "parent" in run.results:
            look_ahead_in_stages(run, ahead, name, target)
    else:
        after = ["parent", "data", *["calibrate"] * needs_scores(target)]
        if is_trained_first(target):
            learned = run.folder / "masks" / name / "run" / CHECKPOINTS
            ahead.look(f"masks/{name}", lambda: run.mask_job(name, target)[1], after=after, precious=[learned])
            after.append(f"masks/{name}")
        ahead.look(f"prune/{name}", partial(run.pruning_inputs, name, target), after=after)
    if "random" in run.recipe.arms_of(name):
        _look_at_random(run, ahead, name, target)


def _look_at_random(run: Pipeline, ahead: LookAhead, name: str, target: Target) -> None:
    """Look at random weights: made from the pruned ones, or from nothing but a shape that is known before them."""
    pruned = run.pruned(name) / HUGGING_FACE
    if f"prune/{name}" in run.results or "parent" not in run.results or not _is_free(run, target):

        def inputs() -> dict[str, Any]:
            source = open_source(pruned)
            return run.random_inputs(name, target, shape_of(source), masked=bool(masks_of(source).names))

        ahead.look(f"random/{name}", inputs, after=[f"prune/{name}"], reads=[pruned])
        return
    shape = expected_shape(target, run.parent_shape).shape
    ahead.look(f"random/{name}", lambda: run.random_inputs(name, target, shape, masked=False), after=["parent"])


def _is_free(run: Pipeline, target: Target) -> bool:
    """Return whether random weights of a target depend on its shape alone, and that on numbers alone."""
    if target.method == DENSE:
        return True
    masked = is_sparse(target) or bool(masks_of(run.parent_source).names)
    return expected_shape(target, run.parent_shape).exact and not masked and not target.keep_parent_embeddings


def _arms(run: Pipeline) -> list[Arm]:
    """Return the arms whose training is known as far as their stages are; of a parent that is not, the pruned ones."""
    recipe = run.recipe
    if "parent" not in run.results:
        pruned = [name for name in recipe.targets if "pruned" in recipe.arms_of(name)]
        return [arm for name in pruned for arm in recipe.pruned_runs(name)]
    folders = {name: run.pruned(name) / HUGGING_FACE for name in recipe.targets if f"prune/{name}" in run.results}
    shapes = {name: shape_of(open_source(folder)) for name, folder in folders.items() if folder.exists()}
    exact = {name for name, target in recipe.targets.items() if expected_shape(target, run.parent_shape).exact}
    arms = settle(recipe, run.parent_shape, shapes).runs
    return [arm for arm in arms if arm.setting is None or arm.target in exact | shapes.keys()]
