"""Factories for NeMo's own command: every recipe, with arguments that select a run, and every pruning method.

``nemo llm pretrain --factory "pvs_smollm2_135m_demo(target=width,init=pruned)"`` trains what ``pvs run`` has prepared
with ``--prepare-only``; with ``--dryrun`` nothing has to be prepared. ``nemo llm prune --factory pvs_flap source=...
target_folder=...`` runs our pruning: a factory may return a Partial of a function other than the verb's, and NeMo-Run
calls that.
"""

from __future__ import annotations

import tempfile
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nemo_run as run
from nemo.collections import llm
from nemo.lightning import io

from nemo_pvs.checkpoints.nemo.context import write_context
from nemo_pvs.cli.factory_names import choose_arm, factory_name, prune_factory_name
from nemo_pvs.cli.verbs import prune
from nemo_pvs.errors import UserError
from nemo_pvs.megatron.pretrain import hold_masks, pretrain_recipe
from nemo_pvs.megatron.rank import pretrain_on_cpu
from nemo_pvs.model.layout import Layout as WeightLayout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.planning.dry_run import settled
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.planning.teacher import teacher_shape
from nemo_pvs.pruning.registry import at_once
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from nemo_pvs.recipe.options import is_sparse
from nemo_pvs.recipe.recipe import Arm, Recipe
from nemo_pvs.recipe.series import is_one_run
from nemo_pvs.system.progress import console
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.machine import H100, Machine, h100_layout

_MACHINES: dict[str, Callable[[], Machine]] = {"h100": lambda: H100, "here": Machine.here}


def register() -> None:
    """Register all factories, which NeMo-Run finds by target and name."""
    for name in packaged_recipes():
        recipe = settled(load_recipe(name))
        if not is_one_run(recipe):  # only pvs run knows the order of its parts
            continue
        run.cli.factory(_pretrain(recipe), target=llm.pretrain, name=factory_name(name))
    for method in at_once():
        run.cli.factory(_prune(method), target=llm.prune, name=prune_factory_name(method))


def pretrain_arm(
    recipe: Recipe, arm: Arm, *, folder: str = "", num_nodes: int = 0, machine: str = "h100"
) -> run.Partial:
    """Return NeMo's pretraining of one arm of a recipe.

    Args:
        recipe: The recipe.
        arm: One of its runs.
        folder: The run folder, as for ``--out`` of ``pvs run``; by default ``runs/<recipe name>``.
        num_nodes: Number of nodes with eight H100s for which to choose a layout; 0 for the recipe's own layout.
        machine: ``h100``, or ``here`` for this machine.

    Raises:
        UserError: there is no such machine, no layout fits, or the model is neither described in the recipe nor
            prepared.
    """
    if machine not in _MACHINES:
        raise UserError(f"machine is {machine!r}; choose {' or '.join(_MACHINES)}.")
    job = Pipeline(recipe, Path(folder or f"runs/{recipe.name}")).job(arm)
    described = None if (job.initial / "context").is_dir() else _describe(recipe, arm, job)
    if num_nodes:
        gpus = num_nodes * H100.processes_per_node
        layout, reasons = h100_layout(_shape(recipe, arm), job.training, gpus, _teacher(recipe, arm))
        job = replace(job, layout=layout)
        console.print(*reasons, sep="\n")
    chosen = _MACHINES[machine]()
    pretraining = pretrain_recipe(job, chosen, described)
    if described and is_sparse(recipe.targets[arm.target]):
        pretraining.trainer.callbacks[1:1] = hold_masks(job, sparse=True)
    return pretraining if chosen.gpu else run.Partial(pretrain_on_cpu, **pretraining.__arguments__)


def _shape(recipe: Recipe, arm: Arm) -> Shape:
    config = recipe.parent.normal_config
    if config is None:
        raise UserError(
            f"Recipe {recipe.name} has no parent.config, so the shape of {arm.name} is unknown until it is prepared; "
            f"run pvs run --prepare-only first, or add parent.config."
        )
    parent = WeightLayout.for_config(config).shape(config)
    return expected_shape(recipe.targets[arm.target], parent).shape


def _teacher(recipe: Recipe, arm: Arm) -> Shape | None:
    config = recipe.parent.normal_config
    if arm.training.distill is None or config is None:
        return None
    return teacher_shape(recipe, WeightLayout.for_config(config).shape(config))


def _describe(recipe: Recipe, arm: Arm, job: TrainingJob) -> run.Config:
    """Return the configuration that an arm's model will have after the prune stage.

    If scores determine the size of each layer, all layers have about the average size until then.
    """
    shape = _shape(recipe, arm)
    parent = {"torch_dtype": "bfloat16", **(recipe.parent.normal_config or {})}
    config = WeightLayout.for_config(parent).config(shape, parent)
    with tempfile.TemporaryDirectory() as folder:
        write_context(Path(folder) / "context", config, (), vocab_rows=shape.vocab)
        return io.load_context(Path(folder) / "context", subpath="model", build=False)


def _pretrain(recipe: Recipe) -> Callable[..., run.Partial]:
    def factory(
        target: str = "",
        init: str = "",
        tokens: float = 0,
        folder: str = "",
        num_nodes: int = 0,
        machine: str = "h100",
    ) -> run.Partial:
        arm = choose_arm(recipe, target, init, tokens)
        return pretrain_arm(recipe, arm, folder=folder, num_nodes=num_nodes, machine=machine)

    factory.__doc__ = f"{recipe.title}. Choose the run with target, init and tokens."
    factory.__annotations__ = typing.get_type_hints(factory)  # NeMo-Run needs types, not strings
    return factory


def _prune(method: str) -> Callable[[], run.Partial]:
    def factory() -> run.Partial:
        return run.Partial(prune, method=method)

    return factory
