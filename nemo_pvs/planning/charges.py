"""The ledger of a model that one command made: what its parent had cost, and what pruning or training it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.flops import calibration_flops
from nemo_pvs.ledger.ledger import Charge, Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.training import Training

DEPTH_SCAN = "depth scan, prefixes shared"
"""What a ledger notes of a search for layers by the loss."""


@dataclass(frozen=True)
class Spent:
    """What a pruning method took by itself: a calibration layer by layer, or a search for layers."""

    tokens: int
    flops: int
    losses: list[float] | None = None
    """Of the candidates of a search."""
    scores: list[float] | None = None
    """Of the candidates of a search by a task."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Spent:
        """Undo ``to_json``."""
        return cls(values["tokens"], values["flops"], values.get("losses"), values.get("scores"))


def ancestry(ancestor: Path | None, declared_tokens: float | None) -> Ledger:
    """Return the ledger that a model begins with: what the checkpoint had cost whose weights it takes, or nothing.

    Args:
        ancestor: The checkpoint; its own ledger counts before what is declared. None for random weights.
        declared_tokens: Tokens that it was pretrained on; None if nobody knows.

    Raises:
        UserError: the declaration is no number of tokens, or the checkpoint's ledger contradicts it.
    """
    ledger = Ledger()
    if declared_tokens is not None and (declared_tokens < 1 or ancestor is None):
        raise UserError(
            "--parent-tokens says what the weights have seen before; give a positive number, or leave it out."
        )
    if ancestor is not None:
        declared = None if declared_tokens is None else int(declared_tokens)
        ledger.inherit_checkpoint(ancestor, shape_of(open_source(ancestor)), declared)
    return ledger


def tokens_read(data: str, training: Training, first_token: int) -> TokensRead:
    """Return which tokens a training reads of the token file with the hash ``data``, from the first one on."""
    end = first_token + training.steps * training.tokens_per_step
    return TokensRead(data, training.order_seed, training.sequence_length, first_token, end)


def charge_run(
    ledger: Ledger, training: Training, model: WeightSource, teacher: Path | None, read: TokensRead | None = None
) -> None:
    """Charge what training a model took, and its lessons if it had a teacher, the checkpoint of that name."""
    charge_training(ledger, training, shape_of(model), count_masked(model), read)
    if teacher is not None:
        charge_lessons(ledger, training, shape_of(open_source(teacher)), shape_of(model))


def charge_training(
    ledger: Ledger, training: Training, shape: Shape, masked: int, read: TokensRead | None = None
) -> None:
    """Charge a training; ``masked`` weights of the model's matrices are held at zero, ``read`` is what it read."""
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


def charge_lessons(ledger: Ledger, training: Training, teacher: Shape, student: Shape) -> None:
    """Charge what every token of a distilled training takes beside the student."""
    assert training.distill is not None
    tokens = training.steps * training.tokens_per_step
    rate = lesson_flops(training.distill, training.sequence_length, teacher, student)
    ledger.charges.append(
        Charge("teacher", tokens, tokens * rate, "forward, this run", tokens_per_step=training.tokens_per_step)
    )


def lesson_flops(distill: Distillation, sequence_length: int, teacher: Shape, student: Shape) -> int:
    """Return the FLOPs of a token that distillation adds to a training step.

    These are the teacher's forward pass and, where hidden states of unlike widths d and D are compared, their
    projection at every place: ``2 d D`` forward, and as much for its own gradient and for that of the states.
    """
    forward = teacher.flops_per_token(sequence_length=sequence_length, training=False)
    projected = distill.places if student.hidden != teacher.hidden else 0
    return forward + 6 * projected * student.hidden * teacher.hidden


def charge_scores(parent: Shape, tokens: int, sequence_length: int, *, gradients: bool) -> Charge:
    """Return what scores take that are measured on so many tokens."""
    flops = calibration_flops(parent, tokens, sequence_length, gradients=gradients)
    return Charge("calibration", tokens, flops, "one dense pass" + (", and one back" if gradients else ""))


def pruning_charges(made: Mapping[str, Any], task: str | None) -> list[Charge]:
    """Return what a method spent by itself (``pruning.spent.spent``); ``task``: by what layers were chosen."""
    calibration, search = (made.get(name) for name in ("calibration", "search"))
    return charges_of_spent(
        None if calibration is None else Spent.from_json(calibration),
        None if search is None else Spent.from_json(search),
        task,
    )


def charges_of_spent(calibration: Spent | None, search: Spent | None, task: str | None) -> list[Charge]:
    """Return the charges for what a method spent by itself; ``task``: by what layers were chosen."""
    charges = []
    if calibration is not None:
        note = "while pruning, layer by layer"
        charges.append(Charge("calibration", calibration.tokens, calibration.flops, note))
    if search is not None:
        note = f"depth by {task}" if task else DEPTH_SCAN
        charges.append(Charge("search", search.tokens, search.flops, note))
    return charges


def count_masked(model: WeightSource) -> int:
    """Return how many weights the masks of a model hold at zero; one mask is in memory at a time."""
    masks = masks_of(model)
    return sum(int((~masks.read(name)).sum()) for name in masks.names)
