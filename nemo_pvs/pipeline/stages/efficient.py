"""The masks stage of a target of method ``efficient-llm``: the parent trained while its units go, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, fingerprint, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.stages.sheared import prepare_masks
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.kept_units import KeptUnits, state_file
from nemo_pvs.pruning.learned.unit_space import UnitSpace
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.blocks import Target, Training
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Layout
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.system.files import sha256_file
from nemo_pvs.training.job import Loading, TrainingJob
from nemo_pvs.training.trainer import Trainer

METHOD = "efficient-llm"
_TOKENS_PER_INPUT = 4  # with fewer least squares add more than a third of what they cannot predict as noise
_MUCH_DAMPING = 1.0


def prunes_while_training(target: Target) -> bool:
    """Return whether units of a target go while it trains."""
    return target.method == METHOD


def how(target: Target) -> PruningAware:
    """Return what a target asks of the method.

    Raises:
        UserError: nothing.
    """
    if target.pruning_aware is None:
        raise UserError("nothing says how much to remove; give pruning_aware with parameters and tokens.")
    return target.pruning_aware


def aware_training(recipe: Recipe, target: Target) -> Training:
    """Return the training during which units of a target go."""
    return how(target).training(recipe.train)


def aware_layout(target: Target) -> Layout:
    """Return how that training is spread over processes."""
    return how(target).layout or target.layout


def check_pruning_aware(recipe: Recipe, target: Target, parent: Shape) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        UserError: the target is out of reach, the layout does not fit the parent, or what is left might not be fit
            for the layout in which the target is trained on.
    """
    asked, layout, later = how(target), aware_layout(target), target.layout
    asked.check(parent, recipe.train)
    check_training(aware_training(recipe, target), layout, parent)
    for name, size, at_once in (
        ("groups_at_once", parent.kv_groups, asked.groups_at_once),
        ("ffn_at_once", parent.ffn, asked.ffn_at_once),
    ):
        if size % later.tensor_parallel or at_once % later.tensor_parallel:
            raise UserError(
                f"what is left could not be trained on with tensor_parallel {later.tensor_parallel}, which has to "
                f"divide pruning_aware.{name} ({at_once}) and what the parent has ({size}); take another layout, and "
                "say under pruning_aware.layout how the parent is trained."
            )


def about_shape(target: Target, parent: Shape) -> Shape:
    """Return a shape of about the target's size, all kinds of units pruned alike; saliency decides on the true one."""
    parameters = how(target).parameters

    def scaled(share: float) -> Shape:
        sizes = {"hidden": parent.hidden, "ffn": parent.ffn, "kv_groups": parent.kv_groups}
        return parent.replace(**{name: max(1, round(share * size)) for name, size in sizes.items()})

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle).parameters <= parameters else (low, middle)
    return scaled(low)


def charge_pruning_aware(
    ledger: Ledger, recipe: Recipe, target: Target, parent: Shape, read: TokensRead | None = None
) -> None:
    """Charge a pruned arm with that training on ``read``, at the FLOPs of the whole parent, which is what is computed.

    What only chooses and makes up for units is left out, as SparseGPT's Hessians are; the step costs in
    ``tests/benchmarks/README.md`` have it.
    """
    training = aware_training(recipe, target)
    ledger.charge(
        "mask learning",
        training.steps * training.tokens_per_step,
        parent,
        training.sequence_length,
        training=True,
        note="trained while units went",
        tokens_per_step=training.tokens_per_step,
        read=read,
    )


def describe_pruning_aware(recipe: Recipe, target: Target, parent: Shape) -> str:
    """Return one line about that training."""
    training, layout = aware_training(recipe, target), aware_layout(target)
    memory = training_memory(parent, layout, training)
    return (
        f"{training.steps:,} steps of {training.tokens_per_step:,} tokens from token "
        f"{first_token(recipe, target):,}, units go from step {how(target).start_step(training) + 1:,} on; "
        f"TP x PP x DP = {layout.tensor_parallel} x {layout.pipeline_parallel} x {layout.data_parallel}, "
        f"{memory.total / 1e9:,.1f} GB a GPU, {memory.total_recomputed / 1e9:,.1f} recomputed"
        + _doubt(how(target), training, parent)
    )


def _doubt(asked: PruningAware, training: Training, parent: Shape) -> str:
    """Return what to say of compensation from too few tokens."""
    widest = max(parent.hidden, parent.ffn, parent.axis("query"))
    tokens = min(training.tokens_per_step, asked.compensation_tokens)
    if not asked.compensate or asked.damping >= _MUCH_DAMPING or tokens >= _TOKENS_PER_INPUT * widest:
        return ""
    return f"; {tokens:,} tokens are few to compensate {widest:,} inputs: take more of them, or damping: 1"


def end_of_aware(recipe: Recipe, target: Target) -> int:
    """Return the end of what that training reads, in the order of training."""
    training = aware_training(recipe, target)
    return first_token(recipe, target) + training.steps * training.tokens_per_step


def first_token(recipe: Recipe, target: Target) -> int:
    """Return where in the training data that training begins, rounded up to whole steps."""
    given, step = how(target).first_token, recipe.train.tokens_per_step
    first = recipe.data.token_ranges.of("pruned")[0] if given is None else int(given)
    return -(-first // step) * step


def aware_job(recipe: Recipe, name: str, folder: Path, data: Mapping[str, Any]) -> tuple[TrainingJob, dict[str, Any]]:
    """Return the training job in which units of a target go, and what tells it from another.

    Args:
        recipe: The recipe.
        name: The target.
        folder: Of the stage.
        data: As in ``TrainingJob``.
    """
    target = recipe.targets[name]
    asked, training = how(target), aware_training(recipe, target)
    job = TrainingJob(
        name=f"pruning of {name}",
        folder=folder.resolve() / "run",
        initial=folder.resolve() / "initial",
        data=dict(data),
        layout=aware_layout(target),
        training=training,
        first_token=first_token(recipe, target),
        pruning=asked,
        loading=Loading.at_the_start(training),
    )
    return job, {
        "pruning_aware": asked.model_dump(mode="json", exclude={"layout"}),
        "training": training.identity,
        "first_token": job.first_token,
    }


def train_and_prune(trainer: Trainer, job: TrainingJob, parent: WeightSource) -> dict[str, Any]:
    """Train the parent while its units go, from where an earlier attempt stopped.

    Returns:
        ``checkpoint`` and ``masks`` (a hash of the units that are left).
    """
    prepare_masks(job, parent)
    checkpoint = trainer.train(job)
    return {"checkpoint": checkpoint.name, "masks": sha256_file(state_file(job.folder, job.training.steps))}


def prune_by_units(job: TrainingJob, checkpoint: str, parent: WeightSource) -> tuple[PrunedSource, Plan]:
    """Return the model that is left, not written yet, and its plan: the one physical compaction.

    There is none before the end. One in between would save a part of the FLOPs of this training alone, which is short
    (the paper's 8.6 B tokens stand before 50 B or more), at the price of another model, optimizer and set of shards
    each time, of sizes that need not suit the layout while units of single layers go, and of saliency that begins
    anew. Where that is worth it, a recipe may take the result of another as its parent.
    """
    assert job.pruning is not None
    trained = open_source(job.checkpoints / checkpoint)
    space = UnitSpace(shape_of(trained))
    state = KeptUnits.load(state_file(job.folder, job.training.steps), space)
    provenance = {
        "model_fingerprint": fingerprint(trained),
        "parent_fingerprint": fingerprint(parent),
        "pruning_aware": job.pruning.model_dump(mode="json"),
        "removals": {
            kind: sum(removal["units"] for removal in state.removals if removal["kind"] == kind)
            for kind in ("hidden", "groups", "ffn")
        },
    }
    plan = space.plan(state.kept, METHOD, provenance)
    return PrunedSource(trained, plan), plan
