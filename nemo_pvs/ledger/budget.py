"""ScratchBudget: what training from scratch must be given so that it is compared with pruning on equal terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger, Total
from nemo_pvs.model.shape import Shape

Setting = Literal["equal-training-tokens", "equal-total-tokens", "equal-training-flops", "equal-total-flops"]
"""What is equal. The first two are the paper's (arXiv 2606.14150); ``total`` charges the parent's pretraining,
calibration, search, mask learning and the teacher as well."""


@dataclass(frozen=True)
class PrunedArm:
    """The arm that scratch is to be compared with."""

    name: str
    ledger: Ledger
    """What it cost, its ancestors included."""
    shape: Shape
    """Its shape, which is the scratch arm's too."""
    tokens_per_step: int
    """Sequences times their length in one optimizer step of the scratch arm."""
    sequence_length: int = 0
    """Tokens a sequence, for the cost of attention: what the ledger was charged with."""
    masked_parameters: int = 0
    """Weights that a mask holds at zero in both arms."""
    scratch_teacher_flops: int = 0
    """Of a token through the teacher of the scratch arm; 0 where it is not distilled."""
    scratch_before: Ledger = field(default_factory=Ledger)
    """What the scratch arm costs before it is trained: its teacher's pretraining."""


@dataclass(frozen=True)
class ScratchBudget:
    """The training of a scratch arm under one setting."""

    setting: Setting
    spent: Total
    """By the pruned arm, as the setting counts."""
    tokens: int
    """What the setting gives to scratch, rounded up to a whole token."""
    steps: int
    """Optimizer steps: ``tokens`` rounded up, as a recipe rounds them."""
    tokens_per_step: int
    flops: int
    """Of all steps."""

    @property
    def trained_tokens(self) -> int:
        """Tokens of all steps; less than one step more than ``tokens``."""
        return self.steps * self.tokens_per_step


def parse_setting(name: str) -> Setting:
    """Return the setting of this name.

    Raises:
        UserError: there is none.
    """
    for setting in get_args(Setting):
        if name == setting:
            return setting
    raise UserError(f"There is no setting {name!r}; choose one of {', '.join(get_args(Setting))}.")


def scratch_budget(arm: PrunedArm, setting: Setting, *, zeros_skipped: bool = False) -> ScratchBudget:
    """Return what a scratch arm gets so that it has spent what the pruned arm has.

    Args:
        arm: the pruned arm.
        setting: what is equal.
        zeros_skipped: count FLOPs without the products with masked zeros, on both sides.

    Raises:
        UserError: what the setting needs to know is not known.
    """
    in_training = setting.startswith("equal-training")
    spent = getattr(arm.ledger, ("training" if in_training else "total") + ("_zeros_skipped" if zeros_skipped else ""))
    of_tokens = setting.endswith("tokens")
    amount = spent.tokens if of_tokens else spent.flops
    if amount is None:
        unknown = next(charge.activity for charge in arm.ledger.charges if charge.tokens is None)
        mend = "declare them (parent.pretraining_tokens in a recipe)"
        raise UserError(
            f"{setting} cannot be worked out for {arm.name} because the tokens of its {unknown} are unknown; "
            f"{mend if unknown == 'parent pretraining' else 'choose a setting of training, or a number of tokens'}."
        )
    if not amount:
        raise UserError(f"{setting} cannot be worked out for {arm.name}, whose ledger has no training.")
    before, rate, per_token = 0, _training_flops(arm, zeros_skipped), 1
    if arm.scratch_teacher_flops and not in_training:
        total = arm.scratch_before.total_zeros_skipped if zeros_skipped else arm.scratch_before.total
        before = (total.tokens if of_tokens else total.flops) or 0  # known, or the pruned arm's were not
        per_token = 2
        rate += arm.scratch_teacher_flops
    if amount <= before:
        raise UserError(
            f"{setting} cannot be worked out for {arm.name}, which costs less than the teacher of the scratch arm "
            "alone; distil both arms, or neither."
        )
    tokens = -(-(amount - before) // (per_token if of_tokens else rate))
    steps = -(-tokens // arm.tokens_per_step)
    return ScratchBudget(setting, spent, tokens, steps, arm.tokens_per_step, steps * arm.tokens_per_step * rate)


def _training_flops(arm: PrunedArm, zeros_skipped: bool) -> int:
    """Return the FLOPs of a training token, as ``Ledger.charge`` counts them."""
    one = Ledger()
    masked = arm.masked_parameters
    one.charge("training", 1, arm.shape, arm.sequence_length, training=True, masked_parameters=masked)
    return int((one.training_zeros_skipped if zeros_skipped else one.training).flops or 0)
