"""The tables that ``--dry-run`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.table import Table

from nemo_pvs.cluster.profile import SlurmProfile
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.cached_teacher import cached_ranges, describe_caches
from nemo_pvs.planning.dry_run import DryRun, Placement, PlannedArm, PlannedLearning, describe_domains, dry_run
from nemo_pvs.planning.gpu_time import (
    MFU,
    MFU_SOURCE,
    PEAK_FLOPS,
    explain_kernels,
    explain_layout,
    gpu_hours,
    training_flops,
)
from nemo_pvs.planning.learned import learned_target
from nemo_pvs.planning.saves import RATES
from nemo_pvs.planning.teacher import teacher_shape
from nemo_pvs.pruning.target import describe_removal
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.rates import Sweep, peak_of
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.series import phases
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.progress import console


def executor_here() -> str:
    """Return how ``pvs run`` would start the ranks on this machine."""
    if torch.cuda.is_available():
        return "this machine's GPUs, ranks started by torchrun, NCCL"
    return "this machine's CPU, ranks forked, gloo"


def show_series(
    recipe: Recipe, folder: Path, executor: str, mfu: float | None = None, cluster: SlurmProfile | None = None
) -> None:
    """Print what a recipe would do: the dry run of its run, or of the first of each phase if there are several.

    Args:
        recipe: The recipe.
        folder: The run folder.
        executor: Where the ranks would run.
        mfu: Model FLOPs utilisation to expect on a GPU; by default ``planning.gpu_time.MFU``.
        cluster: The cluster that it would be submitted to; by default nodes have eight GPUs.
    """
    steps = phases(recipe, folder)
    if len(steps) == 1 and not recipe.seeds:
        show(dry_run(recipe), folder, executor, mfu, cluster)
        return
    total, hours = 0, 0.0
    for phase in steps:
        plan = dry_run(phase[0].recipe)
        console.rule()
        each = f", {len(phase)} times" if len(phase) > 1 else ""
        console.print(f"{', '.join(str(member.folder) for member in phase)}{each}:", soft_wrap=True)
        show(plan, phase[0].folder, executor, mfu, cluster)
        total += len(phase) * _tokens(plan)
        hours += len(phase) * (plan_hours(plan, mfu) + teacher_hours(plan, mfu))
    console.print(f"training tokens of all runs: {total:,}")
    if on_gpus(recipe.train):
        console.print(f"GPU-hours of all runs: {hours:,.0f}")


def show(
    plan: DryRun, folder: Path, executor: str, mfu: float | None = None, cluster: SlurmProfile | None = None
) -> None:
    """Print a dry run; the other arguments are those of ``show_series``."""
    recipe, train = plan.recipe, plan.recipe.train
    console.print(recipe.title, style="bold")
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
    teacher = teacher_shape(recipe, plan.parent)
    for line in describe_caches(recipe, teacher, folder) if teacher else ():
        console.print(line, soft_wrap=True)
    for one in plan.targets:
        if learned := learned_target(recipe, one.target):
            console.print(f"masks of {one.name}: {learned.describe(plan.parent)}", soft_wrap=True)
    console.print(f"where: {executor}", soft_wrap=True)
    console.print(_targets_table(plan))
    for note in plan.notes:
        console.print(note, soft_wrap=True)
    if on_gpus(train):
        placed = {f"masks of {one.name}": one.placement for one in plan.learnings}
        for one in plan.targets:
            in_rounds = one.largest.shape != one.expected.shape
            placed[f"{one.name}{', after its first stage' if in_rounds else ''}"] = one.largest
        for name, placement in placed.items():
            shape, layout, training = placement.shape, placement.layout, placement.training
            reason = explain_layout(shape, layout, training, placement.teacher)
            console.print(f"layout of {name}: {reason}", soft_wrap=True)
        layouts = [placement.layout for placement in placed.values()]
        console.print(f"also on GPUs: {explain_kernels(layouts, train)}", soft_wrap=True)
        for name, placement in placed.items():
            for line in _describe_saves(name, placement, cluster):
                console.print(line, soft_wrap=True)
        console.print(f"these seconds follow from assumed rates, none of them measured: {RATES}", soft_wrap=True)
    console.print(_arms_table(plan, mfu))
    if on_gpus(train):
        console.print(_describe_gpu_time(train, mfu), soft_wrap=True)
        console.print(
            "measured in training, and in the report: tokens per second, MFU, and the peak memory of a GPU",
            soft_wrap=True,
        )
        if hours := teacher_hours(plan, mfu):
            console.print(f"GPU-hours of the teacher, in addition: {_amount(hours)}", soft_wrap=True)


def _describe_saves(name: str, placement: Placement, cluster: SlurmProfile | None) -> Iterator[str]:
    """Yield one line about what a checkpoint costs, and one if there is too little time for the last one."""
    save, last = placement.saves(cluster.gpus_per_node if cluster else 8)
    seconds = "less than 1 s" if save.seconds < 1 else f"{save.seconds:,.0f} s"
    yield (
        f"saves of {name}: every {placement.training.checkpoint_minutes:g} min {save.host / 1e9:,.0f} GB of host "
        f"memory per node and {seconds}; at the end and on a signal {last.host / 1e9:,.0f} GB and "
        f"{last.seconds:,.0f} s"
    )
    if cluster and last.seconds > cluster.seconds_to_save:
        yield (
            f"warning: {name} is signalled {cluster.seconds_to_save} s (seconds_to_save) before the time limit, but "
            f"its save alone takes {last.seconds:,.0f} s; raise that in the profile, or what was trained since the "
            "last checkpoint is lost"
        )


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
    top = f", top {distill.kept} of its tokens" if distill.kept else ""
    top += ", the rest as one more class" if distill.rest == "class" else ""
    top += ", from a cache" if distill.cache else ""
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
    each = "GB per GPU" if on_gpus(plan.recipe.train) else "GB per rank"
    table = Table("target", "method", "shape", "params", "removed", "ranks", "TP x PP x DP", each, "GB recomputed")
    for one in plan.targets:
        shape, layout, memory = one.expected.shape, one.target.layout, one.largest.memory
        about = "" if one.expected.exact else "about "
        table.add_row(
            one.name,
            one.target.method + (f" {sparsity}" if (sparsity := one.target.given.get("sparsity")) else ""),
            about + _sizes(shape),
            f"{about}{shape.parameters:,}",
            ""
            if shape == plan.parent
            else describe_removal(plan.parent, shape).split(" of")[0].removeprefix("removes "),
            f"{layout.processes:,}",
            _ranks(layout),
            f"{memory.total / 1e9:,.1f}",
            f"{memory.total_recomputed / 1e9:,.1f}",
        )
    return table


def _ranks(layout: Parallelism) -> str:
    """Return TP x PP x DP, followed by whatever else is not the default."""
    more = {
        "VPP": layout.virtual_pipeline,
        "first stage": layout.first_stage_layers,
        "last stage": layout.last_stage_layers,
        "CP": layout.context_parallel if layout.context_parallel > 1 else None,
    }
    words = [f"{name} {size}" for name, size in more.items() if size is not None]
    words += ["SP"] * layout.sequence_parallel + ["plain optimizer"] * (not layout.distributed_optimizer)
    words += [f"{layout.recompute} recomputation"] * (layout.recompute != "none")
    ranks = f"{layout.tensor_parallel} x {layout.pipeline_parallel} x {layout.data_parallel}"
    return ", ".join([ranks, *words])


def _sizes(shape: Shape) -> str:
    ffn, heads, groups = shape.spans
    return f"{shape.layers} x {shape.hidden}, ffn {ffn}, {heads} / {groups} heads"


def _arms_table(plan: DryRun, mfu: float | None) -> Table:
    distilled, gpus = bool(plan.recipe.train.distill), on_gpus(plan.recipe.train)
    columns = ["arm", "peak rate", "steps", "tokens", "from token", "training FLOPs"]
    columns += ["teacher FLOPs"] * distilled + ["total FLOPs"] + ["GPU-hours", "days"] * gpus
    table = Table(*columns)
    days_before: dict[str, float] = {}
    for learning in plan.learnings:
        learned, charge = learning.learned, learning.charge
        hours = _learning_hours(plan, learning, mfu)
        days_before[learning.name] = days = hours / learned.layout.processes / 24
        table.add_row(
            f"masks of {learning.name}",
            _rate(peak_of(learned.training.learning_rate, "pruned")),
            f"{learned.training.steps:,}",
            f"{charge.tokens:,}",
            f"{learned.first_token:,}",
            f"{charge.flops:.4g}",
            *[""] * distilled,
            "",
            *[_amount(hours), _amount(days)] * gpus,
        )
    longest = 0.0
    for one in plan.arms:
        arm, total = one.arm, one.ledger.total.flops
        hours = _hours(plan, one, mfu)
        days = hours / arm.layout.processes / 24
        waited = days_before.get(arm.target, 0.0) if arm.initialisation == "pruned" else 0.0
        longest = max(longest, waited + days)
        table.add_row(
            arm.name,
            _rate(peak_of(arm.training.learning_rate, arm.initialisation)),
            f"{arm.training.steps:,}",
            f"{arm.tokens:,}",
            f"{arm.first_token:,}",
            f"{one.ledger.training.flops:.4g}",
            *[_teacher_flops(one.ledger)] * distilled,
            "unknown" if total is None else f"{total:.4g}",
            *[_amount(hours), _amount(days)] * gpus,
        )
    flops = sum(one.ledger.training.flops or 0 for one in plan.arms)
    flops += sum(learning.charge.flops or 0 for learning in plan.learnings)
    sums = ["in total", "", "", f"{_tokens(plan):,}", "", f"{flops:.4g}", *[""] * distilled, ""]
    table.add_row(*sums, *[_amount(plan_hours(plan, mfu)), f"{_amount(longest)} if all run at once"] * gpus)
    return table


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def on_gpus(train: Training) -> bool:
    """Return whether a recipe is meant for GPUs, which its precision says."""
    return train.precision in MFU


def plan_hours(plan: DryRun, mfu: float | None = None) -> float:
    """Return the GPU-hours of all trainings of a run, including those that train the parent to learn what to keep."""
    hours = sum(_learning_hours(plan, learning, mfu) for learning in plan.learnings)
    return hours + sum(_hours(plan, planned, mfu) for planned in plan.arms)


def teacher_hours(plan: DryRun, mfu: float | None = None) -> float:
    """Return the GPU-hours of the teacher that fills the caches of a run; 0 without caches."""
    train, teacher = plan.recipe.train, teacher_shape(plan.recipe, plan.parent)
    taught = sum(part.tokens for part in cached_ranges(plan.recipe))
    if teacher is None:
        return 0.0
    flops = taught * teacher.flops_per_token(sequence_length=train.sequence_length, training=False)
    return gpu_hours(flops, train.precision, mfu)


def _tokens(plan: DryRun) -> int:
    """Return the tokens of all trainings of a run."""
    tokens = sum(learning.charge.tokens or 0 for learning in plan.learnings)
    return tokens + sum(planned.arm.tokens for planned in plan.arms)


def _hours(plan: DryRun, planned: PlannedArm, mfu: float | None) -> float:
    return gpu_hours(training_flops(planned.ledger), plan.recipe.train.precision, mfu)


def _learning_hours(plan: DryRun, learning: PlannedLearning, mfu: float | None) -> float:
    return gpu_hours(learning.charge.flops or 0, plan.recipe.train.precision, mfu)


def _describe_gpu_time(train: Training, mfu: float | None) -> str:
    kind = "fp8" if train.precision == "fp8" else "bf16"
    given = f"{100 * (MFU[kind] if mfu is None else mfu):.0f} % of {PEAK_FLOPS[kind] / 1e12:,.0f} TFLOPs per second"
    source = "as given" if mfu is not None else f"{MFU_SOURCE[kind]}; set your own with --mfu"
    return f"GPU-hours assume an H100 at {given} ({source}), and exclude pruning, evaluation and waiting"


def _rate(rate: float | Sweep) -> str:
    if isinstance(rate, Sweep):
        return f"one of {', '.join(f'{candidate:g}' for candidate in rate.sweep)}"
    return f"{rate:g}"


def _teacher_flops(ledger: Ledger) -> str:
    flops = [charge.flops or 0 for charge in ledger.charges if charge.is_teacher_pass]
    return f"{sum(flops):.4g}" if flops else ""
