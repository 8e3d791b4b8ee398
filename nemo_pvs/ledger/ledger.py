"""Ledger: the tokens and FLOPs that a model cost, including its ancestors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.megatron_run import latest_checkpoint
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.files import read_json, write_json

Activity = Literal["parent pretraining", "calibration", "search", "mask learning", "teacher", "training", "evaluation"]
"""What tokens are spent on; ``teacher`` is the teacher's forward pass in distillation."""

SHARED_ANSWERS = "forward, shared by all arms that read the answers"
"""The note of a charge for an arm's part of a teacher cache; a cache has no training steps."""

LEDGER = "ledger.json"
"""Name of the ledger file in the folder of a run or a checkpoint."""


@dataclass(frozen=True)
class Charge:
    """Tokens processed by one model for one purpose.

    Raises:
        UserError: the numbers contradict each other.
    """

    activity: Activity
    tokens: int | None
    """Tokens processed, including repetitions; None if unknown."""
    flops: int | None
    """Floating-point operations, counting a multiply-add as two and including products with zeros; None if the tokens
    are unknown."""
    note: str = ""
    flops_zeros_skipped: int | None = None
    """``flops`` without products with weights that a mask holds at zero; None if nothing is masked."""
    tokens_per_step: int | None = None
    """Sequences times sequence length in one optimizer step, e.g. 512 x 8192 = 4,194,304; None without steps."""
    read: TokensRead | None = field(default=None, compare=False)
    """Which tokens a training run read; None if unknown or if they are a blend of several files. Not compared: two
    charges are equal if they cost the same."""

    def __post_init__(self) -> None:
        counts = (self.tokens, self.flops, self.flops_zeros_skipped, self.tokens_per_step)
        if any(count is not None and (not isinstance(count, int) or count < 0) for count in counts):
            raise self._wrong("a count that is not a whole number of 0 or more")
        if (self.tokens is None) != (self.flops is None) or (self.flops and not self.tokens):
            raise self._wrong(f"{self.flops} FLOPs for {self.tokens} tokens")
        if self.flops_zeros_skipped is not None and self.flops_zeros_skipped > (self.flops or 0):
            raise self._wrong(
                f"more FLOPs with zeros skipped ({self.flops_zeros_skipped}) than without ({self.flops})"
            )
        if self.tokens_per_step is not None and (self.tokens or 0) % (self.tokens_per_step or 1):
            raise self._wrong(f"{self.tokens} tokens in steps of {self.tokens_per_step}")

    def _wrong(self, fault: str) -> UserError:
        return UserError(f"The ledger does not add up: {self.activity} has {fault}; use the file that a run wrote.")

    @property
    def steps(self) -> int | None:
        """Number of optimizer steps; None if there are none or it is unknown."""
        return self.tokens // self.tokens_per_step if self.tokens is not None and self.tokens_per_step else None

    @property
    def is_teacher_pass(self) -> bool:
        """Whether it is for the teacher's answers in a training run, computed in it or read from a cache."""
        return self.activity == "teacher" and (bool(self.steps) or self.note == SHARED_ANSWERS)


class Total(NamedTuple):
    """Total tokens and FLOPs of several charges; None if any of them is unknown."""

    tokens: int | None
    flops: int | None


@dataclass
class Ledger:
    """What was spent to make one model.

    "Small LLMs: Pruning vs. Training from Scratch" (arXiv 2606.14150) compares at equal *training* tokens (retraining
    against training from scratch) and at equal *total* tokens (which include the parent's pretraining). The paper
    counts tokens and omits calibration. Here every forward and backward pass is charged, also in FLOPs, because a
    token costs more in a parent than in a smaller model.
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
        """Charge tokens processed by a model of this shape, at ``Shape.flops_per_token`` FLOPs each.

        Args:
            activity: What the tokens were spent on.
            tokens: Number of tokens; None if unknown, which makes every total that includes them unknown.
            shape: Shape of the model; a masked model is charged as dense, because dense kernels compute it.
            sequence_length: Tokens per sequence, for the cost of attention scores; 0 omits them (6 N).
            training: True for forward and backward passes, False for forward only.
            note: Which data or which model.
            masked_parameters: Matrix weights that a mask holds at zero; if zeros are skipped, each saves 2 FLOPs per
                token forward and 4 backward (gradients of the input and of the weight).
            tokens_per_step: Tokens per optimizer step, if there were steps.
            read: Which tokens were read, if known.

        Raises:
            UserError: the tokens are not a whole number of steps, or more weights are masked than exist.
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
        """Add the parent's charges: its training as ``parent pretraining``, without its evaluation."""
        for charge in parent.charges:
            if charge.activity != "evaluation":
                activity: Activity = "parent pretraining" if charge.activity == "training" else charge.activity
                self.charges.append(replace(charge, activity=activity))

    def inherit_checkpoint(self, checkpoint: Path | None, shape: Shape, declared_tokens: int | None) -> None:
        """Add a parent's charges from the ledger in its folder, or else the pretraining tokens that the user declared.

        Args:
            checkpoint: The parent's folder, which need not exist; None if the parent is still to be trained.
            shape: The parent's shape.
            declared_tokens: Number of tokens that it was pretrained on; None if unknown. It may differ from the
                ledger's count by less than one optimizer step, because budgets are rounded up to whole steps.

        Raises:
            UserError: there is a ledger whose count differs from the declared tokens.
        """
        parent = None if checkpoint is None else Ledger.of_checkpoint(checkpoint)
        if checkpoint is None or parent is None:
            self.charge("parent pretraining", declared_tokens, shape, 0, training=True, note="as declared")
            return
        if declared_tokens is not None and not parent._counts(declared_tokens):
            training, total = ("unknown" if total.tokens is None else f"{total.tokens:,}" for total in parent._both)
            raise UserError(
                f"{checkpoint / LEDGER} counts {training} training tokens ({total} in all), but "
                f"{declared_tokens:,} pretraining tokens are declared; leave the declaration out."
            )
        self.inherit(parent)

    def _counts(self, tokens: int) -> bool:
        """Return whether ``tokens`` is the training or total count, to within one optimizer step."""
        step = max((charge.tokens_per_step or 1 for charge in self.charges), default=1)
        return any(total.tokens is not None and abs(tokens - total.tokens) < step for total in self._both)

    @property
    def _both(self) -> tuple[Total, Total]:
        return self.training, self.total

    @property
    def read(self) -> list[TokensRead]:
        """The tokens on which the model and its ancestors, including teachers, were trained, as far as known."""
        return [charge.read for charge in self.charges if charge.read is not None]

    @property
    def training(self) -> Total:
        """The cost of training this model alone: the budget that the arms of a comparison share."""
        return _sum(self._of_training)

    @property
    def training_zeros_skipped(self) -> Total:
        """``training``, with FLOPs that omit products with masked zeros."""
        return _sum(map(_zeros_skipped, self._of_training))

    @property
    def total(self) -> Total:
        """The cost of the model and its ancestors, without evaluation, which measures a model but does not make it."""
        return _sum(self._of_making)

    @property
    def total_zeros_skipped(self) -> Total:
        """``total``, with FLOPs that omit products with masked zeros."""
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
        """Build a ledger from the result of ``to_json``.

        Raises:
            UserError: the data is not a ledger, or a charge does not add up.
        """
        try:
            charges = []
            for entry in data:
                values = {**entry}
                values["read"] = TokensRead(**entry["read"]) if entry.get("read") else None
                charges.append(Charge(**values))
        except TypeError as error:
            raise UserError(f"This is not a ledger of nemo_pvs ({error}); use the file that a run wrote.") from None
        for charge in charges:
            if charge.activity not in get_args(Activity):
                raise UserError(
                    f"The ledger charges {charge.activity!r}, but known activities are "
                    f"{', '.join(get_args(Activity))}; use the file that a run wrote."
                )
        return cls(charges)

    def save(self, path: Path) -> None:
        """Write the ledger as JSON, with its totals for human readers."""
        write_json(path, {**self._totals, "charges": self.to_json()})

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Ledger | None:
        """Return the ledger in a checkpoint's folder; None if there is none.

        Raises:
            UserError: as ``load``.
        """
        file = latest_checkpoint(folder) / LEDGER
        return cls.load(file) if file.exists() else None

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read the file that ``save`` wrote.

        Raises:
            UserError: the file is missing or not a ledger, or its totals are not the sums of its charges.
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
    summands = list(charges)
    tokens = [charge.tokens for charge in summands]
    flops = [charge.flops for charge in summands]
    return Total(
        None if None in tokens else sum(filter(None, tokens)), None if None in flops else sum(filter(None, flops))
    )
