"""Ledger: the tokens and FLOPs that a model cost, its ancestors included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from nemo_pvs.errors import UserError
from nemo_pvs.files import read_json, write_json
from nemo_pvs.shape import Shape

Activity = Literal["parent pretraining", "calibration", "search", "teacher", "training", "evaluation"]
"""What tokens are spent on; ``teacher`` is the forward pass of distillation."""


@dataclass(frozen=True)
class Charge:
    """Tokens that went through one model for one purpose."""

    activity: Activity
    tokens: int | None
    """Tokens seen, repetitions counted; None where nobody published them."""
    flops: int | None
    """Floating-point operations, a multiplication and an addition counted as two; None where the tokens are."""
    note: str = ""


class Total(NamedTuple):
    """Tokens and FLOPs of several charges; None as soon as one of them is unknown."""

    tokens: int | None
    flops: int | None


@dataclass
class Ledger:
    """What was spent to make one model.

    "Small LLMs: Pruning vs. Training from Scratch" (arXiv 2606.14150) compares at equal *training* tokens (retraining
    against training from scratch) and at equal *total* tokens (the parent's pretraining charged as well). The paper
    counts tokens and leaves calibration out. Here every forward and backward pass is charged, in FLOPs too, because
    equal tokens through a parent and through a smaller model are not equal work.
    """

    charges: list[Charge] = field(default_factory=list)

    def charge(
        self,
        activity: Activity,
        tokens: int | None,
        shape: Shape,
        sequence_length: int,
        training: bool,
        note: str = "",
    ) -> None:
        """Enter tokens that went through a model of this shape, at ``Shape.flops_per_token`` FLOPs each.

        Args:
            activity: what they were spent on.
            tokens: how many; None if unknown, which makes every total that includes them unknown.
            shape: the model they went through; a masked model is charged as dense, as dense kernels compute it.
            sequence_length: tokens a sequence, for the cost of attention; 0 leaves attention's scores out (6 N).
            training: forward and backward, or forward only.
            note: which data, which model.
        """
        rate = shape.flops_per_token(sequence_length=sequence_length, training=training)
        self.charges.append(Charge(activity, tokens, None if tokens is None else tokens * rate, note))

    def inherit(self, parent: Ledger) -> None:
        """Take over what the parent cost: its training as ``parent pretraining``, its evaluation not at all."""
        for charge in parent.charges:
            if charge.activity != "evaluation":
                activity: Activity = "parent pretraining" if charge.activity == "training" else charge.activity
                self.charges.append(Charge(activity, charge.tokens, charge.flops, charge.note))

    @property
    def training(self) -> Total:
        """What the training of this model alone took: the budget that the arms of a comparison share."""
        return _sum([charge for charge in self.charges if charge.activity == "training"])

    @property
    def total(self) -> Total:
        """What the model took with its ancestors; evaluation measures a model and does not make it: not included."""
        return _sum([charge for charge in self.charges if charge.activity != "evaluation"])

    def to_json(self) -> list[dict[str, Any]]:
        """Return the charges as plain data."""
        return [asdict(charge) for charge in self.charges]

    @classmethod
    def from_json(cls, data: list[Mapping[str, Any]]) -> Ledger:
        """Read what ``to_json`` returned.

        Raises:
            UserError: it is something else.
        """
        try:
            charges = [Charge(**entry) for entry in data]
        except TypeError as error:
            raise UserError(f"This is no ledger of nemo_pvs ({error}); use the file that a run wrote.") from None
        for charge in charges:
            if charge.activity not in get_args(Activity):
                raise UserError(f"The ledger charges {charge.activity!r}; known are {', '.join(get_args(Activity))}.")
        return cls(charges)

    def save(self, path: Path) -> None:
        """Write the ledger as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read the file that ``save`` wrote.

        Raises:
            UserError: the file is missing or is no ledger.
        """
        return cls.from_json(read_json(path))


def _sum(charges: list[Charge]) -> Total:
    tokens = [charge.tokens for charge in charges]
    flops = [charge.flops for charge in charges]
    return Total(
        None if None in tokens else sum(filter(None, tokens)), None if None in flops else sum(filter(None, flops))
    )
