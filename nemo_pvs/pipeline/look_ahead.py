"""Check before any work, from the records of earlier runs, that no stage will have to remove expensive outputs.

A run with a changed recipe must not replace the outputs of one stage only to be refused at the next. So every stage is
checked before the first one starts, except the evaluation, which comes last and removes nothing expensive.
"""

from __future__ import annotations

from typing import Any

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.folder import HUGGING_FACE, RunFolder
from nemo_pvs.pipeline.order import initial_weights
from nemo_pvs.pipeline.records import Records, prune_stage
from nemo_pvs.pipeline.stage import Stage
from nemo_pvs.pipeline.stages.data import data
from nemo_pvs.pipeline.stages.parent import parent
from nemo_pvs.pipeline.stages.teach import teach
from nemo_pvs.pipeline.stages.train import train
from nemo_pvs.pipeline.store import Stages, difference
from nemo_pvs.planning.cached_teacher import CachedRange, cached_ranges
from nemo_pvs.planning.equal_terms import settle
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.recipe.recipe import Arm


class LookAhead:
    """Checks stages in order and collects the records of those whose results will stay the same.

    A stage whose inputs differ from before counts as changed, and so does every stage that depends on its result. The
    result of a stage that has not been run is unknown, and the stages that depend on it are not checked.
    """

    def __init__(self, stages: Stages, records: Records) -> None:
        """Start with no changed stages.

        Args:
            stages: The stages on disk.
            records: Filled with the records of unchanged stages.
        """
        self.stages = stages
        self.records = records
        self._changed: dict[str, str] = {}

    def look(self, stage: Stage[Any]) -> None:
        """Check a stage.

        Raises:
            UserError: a precious output would have to be removed.
        """
        begun = self.stages.begun(stage.name)
        inherited = next((self._changed[name] for name in stage.after if name in self._changed), None)
        if inherited is not None:
            self._changed[stage.name] = inherited
            if begun:
                self.stages.refuse(stage.name, stage.precious, inherited)
            return
        if any(name not in self.records for name in stage.after):
            return
        if stage.known and (known := stage.known()):
            self.records[stage.name] = known
            return
        if not begun or not all(path.exists() for path in stage.reads):
            return
        now = stage.inputs()
        if self.stages.matches(begun, now):
            if "result" in begun and not stage.known:
                self.records[stage.name] = stage.record.from_json(begun["result"])
            return
        if stage.decisive(begun["inputs"]) == stage.decisive(now):
            return
        change = difference(begun, now)
        self.stages.refuse(stage.name, stage.precious, change)
        if "result" in begun:  # without a result, later stages may have been made from an earlier attempt
            self._changed[stage.name] = f"{change} (in {stage.name})"


def look_ahead(run: RunFolder) -> Records:
    """Refuse a run if one of its stages would have to remove an expensive output; nothing is written.

    Returns:
        The records of the stages whose results will stay the same, and of those that need no work.

    Raises:
        UserError: an output that took long to make would have to be removed.
    """
    kept, run.records = run.records, Records()
    ahead = LookAhead(run.stages, run.records)
    try:
        ahead.look(parent(run))
        ahead.look(data(run))
        for group in initial_weights(run):
            for stage in group:
                ahead.look(stage)
        arms = _arms(run)
        for number, tokens in enumerate(_caches(run, arms), 1):
            ahead.look(teach(run, number, tokens))
        for arm in arms:
            ahead.look(train(run, arm))
        return run.records
    finally:
        run.records = kept


def _arms(run: RunFolder) -> list[Arm]:
    """Return the arms whose budgets are known; only pruned arms if the parent is not known yet."""
    recipe = run.recipe
    if "parent" not in run.records:
        pruned = [name for name in recipe.targets if "pruned" in recipe.arms_of(name)]
        return [arm for name in pruned for arm in recipe.pruned_runs(name)]
    shapes = _shapes(run)
    exact = {name for name, target in recipe.targets.items() if expected_shape(target, run.parent_shape).exact}
    arms = settle(recipe, run.parent_shape, shapes).runs
    return [arm for arm in arms if arm.setting is None or arm.target in exact | shapes.keys()]


def _shapes(run: RunFolder) -> dict[str, Shape]:
    """Return the shapes of the targets that have been pruned, by name."""
    recipe = run.recipe
    folders = {name: run.pruned(name) / HUGGING_FACE for name in recipe.targets if prune_stage(name) in run.records}
    return {name: shape_of(open_source(folder)) for name, folder in folders.items() if folder.exists()}


def _caches(run: RunFolder, arms: list[Arm]) -> list[CachedRange]:
    """Return what the run's teacher caches cover; none if the text or the budget of an arm is not known yet."""
    if "parent" not in run.records or "data" not in run.records:
        return []
    recipe = settle(run.recipe, run.parent_shape, _shapes(run))
    return cached_ranges(recipe) if len(arms) == len(recipe.runs) else []
