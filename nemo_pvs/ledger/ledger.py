"""Ledger: the tokens and FLOPs that a model cost, its ancestors included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.files import read_json, write_json

Activity = Literal["parent pretraining", "calibration", "search", "mask learning", "teacher", "training", "evaluation"]
"""What tokens are spent on; ``teacher`` is the forward pass of distillation."""

LEDGER = "ledger.json"
"""The ledger's file in the folder of a run or of a checkpoint."""


@dataclass(frozen=True)
class Charge:
    """Tokens that went through one model for one purpose.

    Raises:
        UserError: the numbers contradict each other.
    """

    activity: Activity
    tokens: int | None
    """Tokens seen, repetitions counted; None where nobody published them."""
    flops: int | None
    """Floating-point operations, a multiplication and an addition counted as two, products with zeros as any other;
    None where the tokens are."""
    note: str = ""
    flops_zeros_skipped: int | None = None
    """The same without the products with weights that a mask holds at zero; None where nothing is masked."""
    tokens_per_step: int | None = None
    """Sequences times their length in one optimizer step: 512 x 8192 is 4,194,304; None where there are no steps."""
    read: TokensRead | None = field(default=None, compare=False)
    """Which tokens, of a training; None where that is not known, or they are a blend of several files. Two charges are
    equal if they cost the same."""

    def __post_init__(self) -> None:
        counts = (self.tokens, self.flops, self.flops_zeros_skipped, self.tokens_per_step)
        if any(count is not None and (not isinstance(count, int) or count < 0) for count in counts):
            raise self._wrong("a count that is no whole number of 0 or more")
        if (self.tokens is None) != (self.flops is None) or (self.flops and not self.tokens):
            raise self._wrong(f"{self.flops} FLOPs for {self.tokens} tokens")
        if self.flops_zeros_skipped is not None and self.flops_zeros_skipped > (self.flops or 0):
            raise self._wrong(
                f"more FLOPs with zeros skipped ({self.flops_zeros_skipped}) than without ({self.flops})"
            )
        if self.tokens_per_step is not None and (self.tokens or 0) % (self.tokens_per_step or 1):
            raise self._wrong(f"{self.tokens} tokens in steps of {self.tokens_per_step}")

    def _wrong(self, what: str) -> UserError:
        return UserError(f"The ledger does not add up: {self.activity} has {what}; use the file that a run wrote.")

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where there are none or they are not known."""
        return self.tokens // self.tokens_per_step if self.tokens is not None and self.tokens_per_step else None


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
        *,
        masked_parameters: int = 0,
        tokens_per_step: int | None = None,
        read: TokensRead | None = None,
    ) -> None:
        """Enter tokens that went through a model of this shape, at ``Shape.flops_per_token`` FLOPs each.

        Args:
            activity: what they were spent on.
            tokens: how many; None if unknown, which makes every total that includes them unknown.
            shape: the model they went through; a masked model is charged as dense, as dense kernels compute it.
            sequence_length: tokens a sequence, for the cost of attention; 0 leaves attention's scores out (6 N).
            training: forward and backward, or forward only.
            note: which data, which model.
            masked_parameters: weights of its matrices that a mask holds at zero; each saves 2 FLOPs a token forward
                and 4 backward (its share of the input's gradient and its own) where zeros are skipped.
            tokens_per_step: of one optimizer step, if the tokens were seen in such.
            read: which tokens they were, if that is known.

        Raises:
            UserError: the tokens are no whole number of steps, or more weights are masked than there are.
        """
        rate = shape.flops_per_token(sequence_length=sequence_length, training=training)
        skipped = rate - (6 if training else 2) * masked_parameters
        self.charges.append(
            Charge(
                activity,
                tokens,
                None if tokens is None else tokens * rate,
                note,
                flops_zeros_skipped=tokens * skipped if tokens is not None and masked_parameters else None,
                tokens_per_step=tokens_per_step,
                read=read,
            )
        )

    def inherit(self, parent: Ledger) -> None:
        """Take over what the parent cost: its training as ``parent pretraining``, its evaluation not at all."""
        for charge in parent.charges:
            if charge.activity != "evaluation":
                activity: Activity = "parent pretraining" if charge.activity == "training" else charge.activity
                self.charges.append(replace(charge, activity=activity))

    def inherit_checkpoint(self, checkpoint: Path, shape: Shape, declared_tokens: int | None) -> None:
        """Take over what a parent cost: from the ledger in its folder, else as its user declares.

        Args:
            checkpoint: the parent's folder; it need not exist.
            shape: the parent's.
            declared_tokens: tokens that it was pretrained on; None if nobody knows. A number within one optimizer
                step of what its ledger counts is the same number: budgets are rounded up to whole steps.

        Raises:
            UserError: there is a ledger, and it counts other tokens than the user.
        """
        parent = Ledger.of_checkpoint(checkpoint)
        if parent is None:
            self.charge("parent pretraining", declared_tokens, shape, 0, training=True, note="as declared")
            return
        if declared_tokens is not None and not parent._counts(declared_tokens):
            training, total = ("unknown" if one.tokens is None else f"{one.tokens:,}" for one in parent._both)
            raise UserError(
                f"{checkpoint / LEDGER} counts {training} training tokens ({total} in all), but "
                f"{declared_tokens:,} pretraining tokens are declared; leave the declaration out."
            )
        self.inherit(parent)

    def _counts(self, tokens: int) -> bool:
        """Return whether a number of tokens is that of the training, or of all there was, to one optimizer step."""
        step = max((charge.tokens_per_step or 1 for charge in self.charges), default=1)
        return any(one.tokens is not None and abs(tokens - one.tokens) < step for one in self._both)

    @property
    def _both(self) -> tuple[Total, Total]:
        return self.training, self.total

    @property
    def read(self) -> list[TokensRead]:
        """Which tokens the model and its ancestors, teachers among them, were trained on, as far as it is known."""
        return [charge.read for charge in self.charges if charge.read is not None]

    @property
    def training(self) -> Total:
        """What the training of this model alone took: the budget that the arms of a comparison share."""
        return _sum(self._of_training)

    @property
    def training_zeros_skipped(self) -> Total:
        """``training``, its FLOPs without the products with masked zeros."""
        return _sum(map(_zeros_skipped, self._of_training))

    @property
    def total(self) -> Total:
        """What the model took with its ancestors; evaluation measures a model and does not make it: not included."""
        return _sum(self._of_making)

    @property
    def total_zeros_skipped(self) -> Total:
        """``total``, its FLOPs without the products with masked zeros."""
        return _sum(map(_zeros_skipped, self._of_making))

    @property
    def _of_training(self) -> list[Charge]:
        return [charge for charge in self.charges if charge.activity == "training"]

    @property
    def _of_making(self) -> list[Charge]:
        return [charge for charge in self.charges if charge.activity != "evaluation"]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the charges as plain data."""
        charges = [asdict(charge) for charge in self.charges]
        return [{key: value for key, value in charge.items() if (key, value) != ("read", None)} for charge in charges]

    @classmethod
    def from_json(cls, data: list[Mapping[str, Any]]) -> Ledger:
        """Read what ``to_json`` returned.

        Raises:
            UserError: it is something else, or a charge does not add up.
        """
        try:
            charges = [
                Charge(**{**entry, "read": TokensRead(**entry["read"]) if entry.get("read") else None})
                for entry in data
            ]
        except TypeError as error:
            raise UserError(f"This is no ledger of nemo_pvs ({error}); use the file that a run wrote.") from None
        for charge in charges:
            if charge.activity not in get_args(Activity):
                raise UserError(f"The ledger charges {charge.activity!r}; known are {', '.join(get_args(Activity))}.")
        return cls(charges)

    def save(self, path: Path) -> None:
        """Write the ledger as JSON, its totals beside the charges for people to read."""
        write_json(path, {**self._totals, "charges": self.to_json()})

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Ledger | None:
        """Return the ledger in a checkpoint's folder; None where there is none.

        Raises:
            UserError: as ``load``.
        """
        file = folder / LEDGER
        return cls.load(file) if file.exists() else None

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read the file that ``save`` wrote.

        Raises:
            UserError: the file is missing, is no ledger, or its totals are not the sums of its charges.
        """
        data = read_json(path)
        if not isinstance(data, dict):
            return cls.from_json(data)
        ledger = cls.from_json(data.get("charges", [None]))
        for name, total in ledger._totals.items():
            if data.get(name) != total:
                raise UserError(
                    f"The ledger {path} does not add up: it states {data.get(name)} for {name}, but its charges sum "
                    f"to {total}; use the file that a run wrote."
                )
        return ledger

    @property
    def _totals(self) -> dict[str, dict[str, int | None]]:
        names = ("training", "training_zeros_skipped", "total", "total_zeros_skipped")
        return {name: getattr(self, name)._asdict() for name in names}


def _zeros_skipped(charge: Charge) -> Charge:
    skipped = charge.flops_zeros_skipped
    return charge if skipped is None else replace(charge, flops=skipped, flops_zeros_skipped=None)


def _sum(charges: Iterable[Charge]) -> Total:
    entered = list(charges)
    tokens = [charge.tokens for charge in entered]
    flops = [charge.flops for charge in entered]
    return Total(
        None if None in tokens else sum(filter(None, tokens)), None if None in flops else sum(filter(None, flops))
    )
