"""``pvs run --dry-run``: everything that a recipe would do, from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.token_files import check_end, token_file_hash
from nemo_pvs.data.tokenize import count_tokens
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.layout import Layout as WeightLayout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.checks import check_unread
from nemo_pvs.pipeline.tokens import check_domains_end
from nemo_pvs.planning.equal_terms import arm_cost, pruning_cost, settle
from nemo_pvs.planning.learned import describe_stage, end_of_reading, is_trained_first, untrained_first
from nemo_pvs.planning.memory import Memory, training_memory
from nemo_pvs.planning.rounds import stages_of
from nemo_pvs.planning.teacher import check_recipe_teacher, teacher_shape
from nemo_pvs.pruning.target import describe_removal
from nemo_pvs.recipe.blocks import DENSE, Target
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.fields import Layout
from nemo_pvs.recipe.options import Expected, check_recipe, expected_shape, needs_scores
from nemo_pvs.recipe.recipe import Arm, Recipe
from nemo_pvs.recipe_domains import describe_domains
from nemo_pvs.system.progress import console


@dataclass(frozen=True)
class PlannedTarget:
    """One target before any work."""

    name: str
    target: Target
    expected: Expected
    memory: Memory
    spent: Ledger
    """What pruning to it costs; a calibration that several targets share is in each."""


@dataclass(frozen=True)
class PlannedArm:
    """One training run before any work."""

    arm: Arm
    ledger: Ledger


@dataclass(frozen=True)
class DryRun:
    """What a recipe would do."""

    recipe: Recipe
    parent: Shape
    targets: tuple[PlannedTarget, ...]
    arms: tuple[PlannedArm, ...]
    stages: tuple[str, ...]


def dry_run(recipe: Recipe) -> DryRun:
    """Work out everything that ``pvs run`` would do, without reading a weight or a token.

    Raises:
        UserError: something in the recipe is impossible, or the parent's sizes are not known here.
    """
    config = parent_config(recipe)
    parent = WeightLayout.for_config(config).shape(config)
    check_recipe(recipe, parent, int(config.get("max_position_embeddings", 0)))
    check_recipe_teacher(recipe, parent)
    recipe = settle(recipe, parent)
    teacher = teacher_shape(recipe, parent)
    _check_data(recipe)
    if (file := _training_file(recipe)) is not None:
        check_unread(recipe, file)
    targets = tuple(_target(recipe, name, target, parent, teacher) for name, target in recipe.targets.items())
    shapes = {planned.name: planned.expected.shape for planned in targets}
    arms = tuple(PlannedArm(arm, arm_cost(recipe, arm, shapes[arm.target], parent)) for arm in recipe.runs)
    return DryRun(recipe, parent, targets, arms, tuple(_stages(recipe)))


def settled(recipe: Recipe) -> Recipe:
    """Return a recipe whose runs are known: with a number for each budget such as ``equal-total-tokens``.

    Raises:
        UserError: there is such a budget, and the parent's sizes are not known here.
    """
    return (
        dry_run(recipe).recipe if any(True for name in recipe.targets for _ in recipe.matched_runs(name)) else recipe
    )


def parent_config(recipe: Recipe) -> Mapping[str, Any]:
    """Return the parent's config.json: of the checkpoint if it is here, else as the recipe states it.

    Raises:
        UserError: neither is there.
    """
    source, stated = recipe.parent.source, recipe.parent.normal_config
    if source is not None and Path(source).is_dir():
        return open_source(source).config
    if stated is None:
        raise UserError(
            f"The parent {source} is not a folder here, and the recipe has no parent.config with its sizes; add its "
            "config.json there, or name a folder as parent.source."
        )
    return stated


def _check_data(recipe: Recipe) -> None:
    """Refuse ranges past the end of token files that are here; those that are not are looked at when they are."""
    token_files = recipe.data.token_files
    if token_files is None:
        return
    if recipe.data.domains:
        _, names = token_files.blend
        if all(Path(f"{name}.idx").is_file() for name in names):
            available = (count_tokens(Path(name)) for name in names)
            check_domains_end(recipe, dict(zip(recipe.data.domains, available, strict=True)), end_of_reading(recipe))
        return
    weights, names = token_files.blend
    if all(Path(f"{name}.idx").is_file() for name in names):
        check_end(
            end_of_reading(recipe),
            recipe.train.sequence_length,
            [count_tokens(Path(name)) for name in names],
            weights,
            names,
        )


def _training_file(recipe: Recipe) -> str | None:
    """Return the hash of the file with the training tokens, if there is one and it is here."""
    token_files = recipe.data.token_files
    names = token_files.blend[1] if token_files and not recipe.data.domains else []
    return token_file_hash(Path(names[0])) if len(names) == 1 and Path(f"{names[0]}.bin").is_file() else None


def _target(recipe: Recipe, name: str, target: Target, parent: Shape, teacher: Shape | None) -> PlannedTarget:
    expected = expected_shape(target, parent)
    distilled = any(recipe.distills(name, initialisation) for initialisation in recipe.arms_of(name))
    memory = training_memory(expected.shape, target.layout, recipe.train, teacher if distilled else None)
    return PlannedTarget(name, target, expected, memory, pruning_cost(recipe, target, expected.shape, parent))


def _stages(recipe: Recipe) -> list[str]:
    """Return the stages in the order in which ``pipeline.Pipeline`` does them."""
    stages = ["parent", "data"]
    if any(needs_scores(target) for target in recipe.targets.values()):
        stages.append("calibrate")
    for name, target in untrained_first(recipe.targets):
        if is_trained_first(target):
            stages.append(f"masks/{name}")
        if target.method != DENSE or "pruned" in recipe.arms_of(name):
            between = f" ({stages_of(target)} times, training between)" if stages_of(target) > 1 else ""
            stages.append(f"prune/{name}{between}")
        if "random" in recipe.arms_of(name):
            stages.append(f"random/{name}")
    stages += [f"train/{arm.name}" for arm in recipe.runs]
    stages += ["evaluate"] + ["evaluate/tasks"] * bool(recipe.evaluate.tasks)
    return [*stages, "report"]


def executor_here() -> str:
    """Return how ``pvs run`` would start the ranks on this machine."""
    if torch.cuda.is_available():
        return "this machine's GPUs, ranks started by torchrun, NCCL"
    return "this machine's CPU, ranks forked, gloo"


def show(plan: DryRun, executor: str) -> None:
    """Print a dry run; ``executor`` says where the ranks would run."""
    recipe, train = plan.recipe, plan.recipe.train
    console.print(f"[bold]{recipe.title}[/]")
    console.print(f"parent: {recipe.parent.name}, {plan.parent}", soft_wrap=True)
    console.print(f"stages: {', '.join(_in_short(plan.stages))}", soft_wrap=True)
    console.print(
        f"a step: {train.global_batch_size:,} sequences of {train.sequence_length:,} = {train.tokens_per_step:,} "
        f"tokens; {train.warmup} warm-up, {train.precision} precision",
        soft_wrap=True,
    )
    for line in describe_domains(recipe, {one.name: one.expected.shape.parameters for one in plan.targets}):
        console.print(line, soft_wrap=True)
    if train.distill:
        console.print(_describe(train.distill), soft_wrap=True)
    for one in plan.targets:
        if is_trained_first(one.target):
            console.print(f"masks of {one.name}: {describe_stage(recipe, one.target, plan.parent)}", soft_wrap=True)
    console.print(f"where: {executor}", soft_wrap=True)
    console.print(_targets_table(plan))
    console.print(_arms_table(plan))


def _describe(distill: Distillation) -> str:
    """Return one line about how arms are distilled."""
    loss = f"{distill.kl_weight:g} x KL(teacher || student)"
    if distill.lm_weight:
        loss = f"{distill.lm_weight:g} x LM loss + {loss}"
    if distill.layer_pairs:
        pairs = ", ".join(f"{ours}:{theirs}" for ours, theirs in distill.layer_pairs)
        loss += f" + {distill.hidden_weight:g} x {distill.hidden_loss} of layers {pairs}"
    if distill.embedding_weight:
        loss += f" + {distill.embedding_weight:g} x {distill.hidden_loss} of embeddings"
    if distill.dynamic_weight:
        loss += ", hidden states scaled to the size of the divergence"
    top = f", top {distill.top_k} of its tokens" if distill.top_k else ""
    arms = " and ".join(distill.arms)
    return f"distilled: {arms} arms from {distill.teacher}; {loss}, T = {distill.temperature:g}{top}"


def _in_short(stages: tuple[str, ...]) -> list[str]:
    """Return the stages, those of training as their number: the arms have a table."""
    trained = [stage for stage in stages if stage.startswith("train/")]
    others = [stage for stage in stages if stage not in trained or stage == trained[0]]
    return [f"train ({_arms(len(trained))})" if stage == trained[0] else stage for stage in others]


def _arms(count: int) -> str:
    return "1 arm" if count == 1 else f"{count} arms"


def _targets_table(plan: DryRun) -> Table:
    table = Table("target", "method", "shape", "params", "removed", "ranks", "TP x PP x DP", "GB a GPU", "recomputed")
    for one in plan.targets:
        shape, layout = one.expected.shape, one.target.layout
        about = "" if one.expected.exact else "about "
        table.add_row(
            one.name,
            one.target.method + (f" {one.target.sparsity}" if one.target.sparsity else ""),
            about + _sizes(shape),
            f"{about}{shape.parameters:,}",
            ""
            if shape == plan.parent
            else describe_removal(plan.parent, shape).split(" of")[0].removeprefix("removes "),
            f"{layout.processes:,}",
            _ranks(layout),
            f"{one.memory.total / 1e9:,.1f}",
            f"{one.memory.total_recomputed / 1e9:,.1f}",
        )
    return table


def _ranks(layout: Layout) -> str:
    """Return TP x PP x DP, and behind it what else is not as usual."""
    more = {
        "VPP": layout.virtual_pipeline,
        "first stage": layout.first_stage_layers,
        "last stage": layout.last_stage_layers,
        "CP": layout.context_parallel if layout.context_parallel > 1 else None,
    }
    words = [f"{name} {size}" for name, size in more.items() if size is not None]
    words += ["SP"] * layout.sequence_parallel + ["plain optimizer"] * (not layout.distributed_optimizer)
    ranks = f"{layout.tensor_parallel} x {layout.pipeline_parallel} x {layout.data_parallel}"
    return ", ".join([ranks, *words])


def _sizes(shape: Shape) -> str:
    ffn, heads, groups = shape.spans
    return f"{shape.layers} x {shape.hidden}, ffn {ffn}, {heads} / {groups} heads"


def _arms_table(plan: DryRun) -> Table:
    distilled = bool(plan.recipe.train.distill)
    columns = ["arm", "peak rate", "steps", "tokens", "from token", "training FLOPs", *["teacher FLOPs"] * distilled]
    table = Table(*columns, "total FLOPs")
    for one in plan.arms:
        arm, total = one.arm, one.ledger.total.flops
        table.add_row(
            arm.name,
            f"{arm.training.learning_rate:.2g}",
            f"{arm.training.steps:,}",
            f"{arm.tokens:,}",
            f"{arm.first_token:,}",
            f"{one.ledger.training.flops:.4g}",
            *[_teacher_flops(one.ledger)] * distilled,
            "unknown" if total is None else f"{total:.4g}",
        )
    flops = sum(one.ledger.training.flops or 0 for one in plan.arms)
    table.add_row(
        _arms(len(plan.arms)), "", "", f"{sum(one.arm.tokens for one in plan.arms):,}", "", f"{flops:.4g}", ""
    )
    return table


def _teacher_flops(ledger: Ledger) -> str:
    flops = [charge.flops or 0 for charge in ledger.charges if charge.activity == "teacher" and charge.steps]
    return f"{sum(flops):.4g}" if flops else ""
