"""The order of the stages that make initial weights: the same for doing them and for looking ahead at them.

Each stage is asked for when those before it have been done or looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.stage import Stage
from nemo_pvs.pipeline.stages.calibrate import calibrate
from nemo_pvs.pipeline.stages.learned import learn
from nemo_pvs.pipeline.stages.prune import prune
from nemo_pvs.pipeline.stages.random import random
from nemo_pvs.pipeline.stages.rounds import rounds
from nemo_pvs.planning.learned import is_trained_first, untrained_first
from nemo_pvs.recipe.options import needs_scores, stages_of
from nemo_pvs.recipe.target import DENSE, Target


def initial_weights(run: RunFolder) -> Iterator[Iterator[Stage[Any]]]:
    """Yield the stages that make all initial weights: what targets share, then one group for each target.

    In a group each stage needs those before it; groups need only the first.
    """
    if any(map(needs_scores, run.recipe.targets.values())):
        yield iter([calibrate(run)])
    for name, target in untrained_first(run.recipe.targets):
        yield _target(run, name, target)


def _target(run: RunFolder, name: str, target: Target) -> Iterator[Stage[Any]]:
    if is_trained_first(target):
        yield learn(run, name, target)
    if stages_of(target) > 1:
        if "parent" in run.records:  # else nobody has checked yet that the stages can be
            yield from rounds(run, name, target)
    elif target.method != DENSE or "pruned" in run.recipe.arms_of(name):
        yield prune(run, name, target)
    if "random" in run.recipe.arms_of(name):
        yield random(run, name, target)
