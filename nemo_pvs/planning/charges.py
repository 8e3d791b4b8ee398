"""Ledger charges of a single command: the cost of the parent and of pruning or training the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.flops import calibration_flops
from nemo_pvs.ledger.ledger import SHARED_ANSWERS, Charge, Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.training import Training

DEPTH_SCAN = "depth scan, prefixes shared"
"""The ledger's note for a search for layers by the loss."""


@dataclass(frozen=True)
class Spent:
    """The tokens and FLOPs that a pruning method spent: layer-by-layer calibration, or a search for layers."""

    tokens: int
    flops: int
    losses: list[float] | None = None
    """Losses of the candidates of a search."""
    scores: list[float] | None = None
    """Task scores of the candidates of a search by a task."""

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Spent:
        """Undo ``to_json``."""
        return cls(values["tokens"], values["flops"], values.get("losses"), values.get("scores"))


def ancestry(ancestor: Path | None, declared_tokens: float | None) -> Ledger:
    """Return the initial ledger of a model: the cost of the checkpoint it is made from, or an empty ledger.

    Args:
        ancestor: The checkpoint, whose own ledger takes precedence over ``declared_tokens``; None for random weights.
        declared_tokens: Tokens that it was pretrained on; None if unknown.

    Raises:
        UserError: ``declared_tokens`` is not positive or given without ``ancestor``, or the checkpoint's ledger
            contradicts it.
    """
    ledger = Ledger()
    if declared_tokens is not None and (declared_tokens < 1 or ancestor is None):
        raise UserError(
            "--parent-tokens is the number of tokens that the weights were pretrained on; give a positive number, or "
            "leave it out."
        )
    if ancestor is not None:
        declared = None if declared_tokens is None else int(declared_tokens)
        ledger.inherit_checkpoint(ancestor, shape_of(open_source(ancestor)), declared)
    return ledger


def tokens_read(data: str, training: Training, first_token: int) -> TokensRead:
    """Return the tokens that a training run reads.

    Args:
        data: Hash of the token file.
        training: Settings of the run.
        first_token: First token that it reads, in training order.
    """
    end = first_token + training.steps * training.tokens_per_step
    return TokensRead(data, training.order_seed, training.sequence_length, first_token, end)


def charge_run(
    ledger: Ledger, training: Training, model: WeightSource, teacher: Path | None, read: TokensRead | None = None
) -> None:
    """Charge the training of a model and, if ``teacher`` is a checkpoint, its distillation."""
    charge_training(ledger, training, shape_of(model), count_masked(model), read)
    if teacher is not None:
        charge_teacher_passes(ledger, training, shape_of(open_source(teacher)), shape_of(model))


def charge_training(
    ledger: Ledger, training: Training, shape: Shape, masked: int, read: TokensRead | None = None
) -> None:
    """Charge a training run.

    Args:
        ledger: Gets the charge.
        training: Settings of the run.
        shape: Sizes of the model.
        masked: Number of matrix weights that masks hold at zero.
        read: The tokens that it reads, if known.
    """
    ledger.charge(
        "training",
        training.steps * training.tokens_per_step,
        shape,
        training.sequence_length,
        training=True,
        note="this run",
        masked_parameters=masked,
        tokens_per_step=training.tokens_per_step,
        read=read,
    )


def charge_teacher_passes(
    ledger: Ledger, training: Training, teacher: Shape, student: Shape, share: Fraction | None = None
) -> None:
    """Charge the FLOPs that distillation adds to a training run of the student.

    Args:
        ledger: Gets the charge.
        training: Settings of the run.
        teacher: Sizes of the teacher.
        student: Sizes of the model.
        share: Fraction of the teacher's forward pass that each token is charged if several arms share a cache
            (``cached_teacher.teacher_share``), rounded to whole tokens; None if the arm pays for all of it.
    """
    assert training.distill is not None
    tokens = training.steps * training.tokens_per_step
    rate = lesson_flops(training.distill, training.sequence_length, teacher, student)
    if share is not None:
        shared = round(tokens * share)
        ledger.charges.append(Charge("teacher", shared, shared * rate, SHARED_ANSWERS))
        return
    ledger.charges.append(
        Charge("teacher", tokens, tokens * rate, "forward, this run", tokens_per_step=training.tokens_per_step)
    )


def lesson_flops(distill: Distillation, sequence_length: int, teacher: Shape, student: Shape) -> int:
    """Return the FLOPs per token that distillation adds to a training step.

    These are the teacher's forward pass and, if hidden states of different widths d and D are compared, one projection
    per compared state: ``2 d D`` forward, and as much each for the gradients of its weight and of its input. A teacher
    with more tokens computes the logits of the student's only.
    """
    if teacher.vocab > student.vocab:
        teacher = teacher.replace(vocab=student.vocab)
    forward = teacher.flops_per_token(sequence_length=sequence_length, training=False)
    projected = distill.places if student.hidden != teacher.hidden else 0
    return forward + 6 * projected * student.hidden * teacher.hidden


def charge_scores(parent: Shape, tokens: int, sequence_length: int, *, gradients: bool) -> Charge:
    """Return the charge for measuring importance scores on ``tokens`` tokens."""
    flops = calibration_flops(parent, tokens, sequence_length, gradients=gradients)
    return Charge("calibration", tokens, flops, "one dense pass" + (", and one back" if gradients else ""))


def pruning_charges(made: Mapping[str, Any], task: str | None) -> list[Charge]:
    """Return the charges for what a method spent.

    Args:
        made: The method's ``calibration`` and ``search`` as plain data (``pruning.spent.spent``).
        task: The tasks by which layers were chosen; None if they were chosen by the loss.
    """
    calibration, search = (made.get(name) for name in ("calibration", "search"))
    return charges_of_spent(
        None if calibration is None else Spent.from_json(calibration),
        None if search is None else Spent.from_json(search),
        task,
    )


def charges_of_spent(calibration: Spent | None, search: Spent | None, task: str | None) -> list[Charge]:
    """Return the charges for what a method spent; ``task`` names the tasks by which layers were chosen, if any."""
    charges = []
    if calibration is not None:
        note = "while pruning, layer by layer"
        charges.append(Charge("calibration", calibration.tokens, calibration.flops, note))
    if search is not None:
        note = f"depth by {task}" if task else DEPTH_SCAN
        charges.append(Charge("search", search.tokens, search.flops, note))
    return charges


def count_masked(model: WeightSource) -> int:
    """Return the number of weights that a model's masks hold at zero; only one mask is in memory at a time."""
    masks = masks_of(model)
    return sum(int((~masks.read(name)).sum()) for name in masks.names)
