"""Check that a training run is possible: its sequences, batches and layout against each other and the model."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.training import Training


def check_training(training: Training, layout: Parallelism, shape: Shape, *, exact: bool = True) -> None:
    """Refuse a training run that Megatron would refuse, or do wrongly, after minutes on many GPUs.

    Args:
        training: Settings of the run.
        layout: Its parallel layout.
        shape: Sizes of the model.
        exact: Whether its layer sizes are final; if scores still decide them, tensor parallelism is not checked.

    Raises:
        UserError: the layout does not divide the model, the batch or the sequence.
    """
    split = layout.split if exact else {**layout.split, "tensor_parallel": 1}
    shape.check_parallel(**split, fp8=exact and training.precision == "fp8")
    batch = (layout.micro_batch_size or training.micro_batch_size) * layout.data_parallel
    if training.global_batch_size % batch:
        raise UserError(
            f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size x data_parallel = "
            f"{batch}; change one of the three."
        )
    batches = training.global_batch_size // batch
    if layout.virtual_pipeline and batches % layout.pipeline_parallel:
        raise UserError(
            f"virtual_pipeline needs the micro-batches per step ({batches}) to be a multiple of pipeline_parallel "
            f"({layout.pipeline_parallel}); change micro_batch_size or data_parallel, or leave it out."
        )
    if layout.recompute == "full" and training.distill and training.distill.places:
        raise UserError(
            "recompute: full keeps no hidden states that distill could compare; set it to selective, or leave out "
            "layer_pairs and embedding_weight."
        )
    _check_sequence(training.sequence_length, layout)
    if layout.tp_overlap and not layout.sequence_parallel:
        raise UserError("tp_overlap needs sequence_parallel; leave it out.")
    if layout.tp_overlap and training.precision == "fp8":
        raise UserError(
            "tp_overlap cannot be combined with precision fp8, where the first and the last layer stay in bf16 and "
            "Transformer Engine's buffers would be for FP8 only; leave tp_overlap out, or choose bf16."
        )


def _check_sequence(length: int, layout: Parallelism) -> None:
    """Refuse sequences that do not split evenly; context parallelism gives each rank two chunks for causal balance."""
    pieces = 2 * layout.context_parallel if layout.context_parallel > 1 else 1
    if length % pieces:
        raise UserError(
            f"context_parallel {layout.context_parallel} splits a sequence into {pieces} equal chunks, but {pieces} "
            f"does not divide sequence_length {length}; change one of the two."
        )
    if not layout.sequence_parallel:
        return
    if layout.tensor_parallel == 1:
        raise UserError("sequence_parallel needs tensor_parallel of at least 2; leave it out.")
    if length // layout.context_parallel % layout.tensor_parallel:
        raise UserError(
            f"sequence_parallel splits {length // layout.context_parallel} tokens of a sequence over tensor_parallel "
            f"{layout.tensor_parallel}, which does not divide them; change one, or leave sequence_parallel out."
        )


def check_context(length: int, limit: int, what: str, model: str = "the parent") -> None:
    """Refuse sequences longer than a model's context; ``what`` is the key or option with the length.

    Raises:
        UserError: naming both lengths.
    """
    if length > limit:
        raise UserError(f"{what} is {length}, but {model}'s context ends at {limit} tokens; choose a shorter one.")


def check_domains_end(recipe: Recipe, available: Mapping[str, int], end: int) -> None:
    """Refuse to read the first ``end`` tokens of text in domains if a domain certainly has too few.

    Raises:
        UserError: naming the domain.
    """
    train = recipe.train
    assert train.dynamic_loading is not None
    first = max(1, train.steps // train.validations) * train.tokens_per_step
    train.dynamic_loading.check_enough(available, end, first)
