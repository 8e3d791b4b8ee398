"""The order of the stages that make initial weights, both for running them and for looking ahead.

Stages are yielded lazily: each is declared after the previous ones have been run or checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.stage import Stage
from nemo_pvs.pipeline.stages.calibrate import calibrations
from nemo_pvs.pipeline.stages.data import retokenise
from nemo_pvs.pipeline.stages.learned import learn
from nemo_pvs.pipeline.stages.prune import prune
from nemo_pvs.pipeline.stages.random import random
from nemo_pvs.pipeline.stages.rounds import rounds
from nemo_pvs.pipeline.stages.teacher import slice_teacher
from nemo_pvs.planning.learned import is_trained_first, untrained_first
from nemo_pvs.recipe.options import rounds_of, vocabulary_of
from nemo_pvs.recipe.target import DENSE, Target


def initial_weights(run: RunFolder) -> Iterator[Iterator[Stage[Any]]]:
    """Yield the stages that make all initial weights: groups that targets share, then one group per target.

    Within a group each stage depends on those before it; a target's group depends only on the shared ones.
    """
    for stage in calibrations(run):
        yield iter([stage])
    for name, target in untrained_first(run.recipe.targets):
        yield _target(run, name, target)


def _target(run: RunFolder, name: str, target: Target) -> Iterator[Stage[Any]]:
    if is_trained_first(target):
        yield learn(run, name, target)
    if rounds_of(target) > 1:
        if "parent" in run.records:  # otherwise the rounds have not been checked against the parent yet
            yield from rounds(run, name, target)
    elif target.method != DENSE or "pruned" in run.recipe.arms_of(name):
        yield prune(run, name, target)
    if vocabulary_of(target) is not None:
        yield retokenise(run, name)
        if any(run.recipe.distills(name, initialisation) for initialisation in run.recipe.arms_of(name)):
            yield slice_teacher(run, name)
    if "random" in run.recipe.arms_of(name):
        yield random(run, name, target)
