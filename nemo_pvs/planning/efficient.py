"""EfficientLLM in a recipe: what is trained while units are removed, what it costs, and what is refused."""

from __future__ import annotations

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.options import EFFICIENT
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training

_TOKENS_PER_INPUT = 4  # with fewer least squares add more than a third of what they cannot predict as noise


_MUCH_DAMPING = 1.0


def prunes_while_training(target: Target) -> bool:
    """Return whether units of a target go while it trains."""
    return target.method == EFFICIENT


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


def aware_layout(target: Target) -> Parallelism:
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
