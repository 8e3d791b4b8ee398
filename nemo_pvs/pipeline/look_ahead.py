"""What the stages of a run will find when their turn comes, seen from the records of those that were done before.

A run with another recipe than the one before must not replace anything and only then find out that it may not replace
what comes next. So every stage is looked at before the first one does anything; but the evaluation, which comes last
and removes nothing that took long.
"""

from __future__ import annotations

from typing import Any

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.pipeline.folder import HUGGING_FACE, RunFolder
from nemo_pvs.pipeline.order import initial_weights
from nemo_pvs.pipeline.records import Records, prune_stage
from nemo_pvs.pipeline.stage import Stage
from nemo_pvs.pipeline.stages.data import data
from nemo_pvs.pipeline.stages.parent import parent
from nemo_pvs.pipeline.stages.train import train
from nemo_pvs.pipeline.store import Stages, difference
from nemo_pvs.planning.equal_terms import settle
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.recipe.recipe import Arm


class LookAhead:
    """Looks at stages in their order; ``records`` are those of the stages that will find the same as before.

    A stage that will be done with other inputs than before is changed, and so is every stage that is made from its
    result. What a stage will find that has no result yet is not known, and nothing that is made from it is judged.
    """

    def __init__(self, stages: Stages, records: Records) -> None:
        """Begin; ``records`` is filled while stages are looked at."""
        self.stages = stages
        self.records = records
        self._changed: dict[str, str] = {}

    def look(self, stage: Stage[Any]) -> None:
        """Look at a stage.

        Raises:
            UserError: something precious would have to be removed.
        """
        begun = self.stages.begun(stage.name)
        why = next((self._changed[name] for name in stage.after if name in self._changed), None)
        if why is not None:
            self._changed[stage.name] = why
            if begun:
                self.stages.refuse(stage.name, stage.precious, why)
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
        own = difference(begun, now)
        self.stages.refuse(stage.name, stage.precious, own)
        if "result" in begun:  # else nobody knows what was made from it, or from one before
            self._changed[stage.name] = f"{own} (in {stage.name})"


def look_ahead(run: RunFolder) -> Records:
    """Refuse what a stage of a run would refuse after others have been done; nothing is written.

    Returns:
        The records of the stages that will find the same as before, and of those that need no work.

    Raises:
        UserError: something that took long to make would have to be removed.
    """
    kept, run.records = run.records, Records()
    ahead = LookAhead(run.stages, run.records)
    try:
        ahead.look(parent(run))
        ahead.look(data(run))
        for group in initial_weights(run):
            for stage in group:
                ahead.look(stage)
        for arm in _arms(run):
            ahead.look(train(run, arm))
        return run.records
    finally:
        run.records = kept


def _arms(run: RunFolder) -> list[Arm]:
    """Return the arms whose training is known as far as their stages are; of a parent that is not, the pruned ones."""
    recipe = run.recipe
    if "parent" not in run.records:
        pruned = [name for name in recipe.targets if "pruned" in recipe.arms_of(name)]
        return [arm for name in pruned for arm in recipe.pruned_runs(name)]
    folders = {name: run.pruned(name) / HUGGING_FACE for name in recipe.targets if prune_stage(name) in run.records}
    shapes = {name: shape_of(open_source(folder)) for name, folder in folders.items() if folder.exists()}
    exact = {name for name, target in recipe.targets.items() if expected_shape(target, run.parent_shape).exact}
    arms = settle(recipe, run.parent_shape, shapes).runs
    return [arm for arm in arms if arm.setting is None or arm.target in exact | shapes.keys()]
