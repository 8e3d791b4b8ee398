"""ScratchBudget: how long to train from scratch so that the comparison with pruning is on equal terms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger, Total
from nemo_pvs.model.shape import Shape

EqualBudget = Literal["equal-training-tokens", "equal-total-tokens", "equal-training-flops", "equal-total-flops"]
"""The quantity that is equal. The first two are the paper's (arXiv 2606.14150); ``total`` also charges the parent's
pretraining, calibration, search, mask learning and the teacher."""


@dataclass(frozen=True)
class PrunedArm:
    """The arm with which scratch is compared."""

    name: str
    ledger: Ledger
    """What it cost, including its ancestors."""
    shape: Shape
    """Its shape, which is also the scratch arm's."""
    tokens_per_step: int
    """Sequences times sequence length in one optimizer step of the scratch arm."""
    sequence_length: int = 0
    """Tokens per sequence, for the cost of attention: the value with which the ledger was charged."""
    masked_parameters: int = 0
    """Weights that a mask holds at zero in both arms."""
    scratch_teacher_flops: int = 0
    """FLOPs per token of the scratch arm's teacher; 0 if the arm is not distilled."""
    scratch_teacher_share: Fraction = Fraction(1)
    """Part of the teacher's forward pass that a token is charged, if several arms share its answers."""
    scratch_before: Ledger = field(default_factory=Ledger)
    """What the scratch arm costs before its training: its teacher's pretraining."""


@dataclass(frozen=True)
class ScratchBudget:
    """The training of a scratch arm under one setting."""

    setting: EqualBudget
    spent: Total
    """What the pruned arm spent, as counted by the setting."""
    tokens: int
    """Training tokens of scratch under the setting, rounded up to a whole token."""
    steps: int
    """Optimizer steps for ``tokens``, rounded up as in a recipe."""
    tokens_per_step: int
    flops: int
    """FLOPs of all steps."""

    @property
    def trained_tokens(self) -> int:
        """Tokens of all steps; exceeds ``tokens`` by less than one step."""
        return self.steps * self.tokens_per_step


def parse_setting(name: str) -> EqualBudget:
    """Return the setting with this name.

    Raises:
        UserError: there is no such setting.
    """
    for setting in get_args(EqualBudget):
        if name == setting:
            return setting
    raise UserError(f"There is no setting {name!r}; choose one of {', '.join(get_args(EqualBudget))}.")


def scratch_budget(arm: PrunedArm, setting: EqualBudget, *, zeros_skipped: bool = False) -> ScratchBudget:
    """Compute the budget with which a scratch arm spends as much as the pruned arm.

    Args:
        arm: The pruned arm.
        setting: The quantity that is equal.
        zeros_skipped: Count FLOPs without the products with masked zeros, in both arms.

    Raises:
        UserError: a number that the setting needs is unknown, or no budget remains for training.
    """
    in_training = setting.startswith("equal-training")
    spent = getattr(arm.ledger, ("training" if in_training else "total") + ("_zeros_skipped" if zeros_skipped else ""))
    of_tokens = setting.endswith("tokens")
    amount = spent.tokens if of_tokens else spent.flops
    if amount is None:
        unknown = next(charge.activity for charge in arm.ledger.charges if charge.tokens is None)
        remedy = "choose an equal-training setting, or a number of tokens"
        if unknown == "parent pretraining":
            remedy = "declare them (parent.pretraining_tokens in a recipe)"
        raise UserError(
            f"{setting} cannot be computed for {arm.name} because the tokens of its {unknown} are unknown; {remedy}."
        )
    if not amount:
        raise UserError(
            f"{setting} cannot be computed for {arm.name}, whose ledger has no training; choose a number of tokens."
        )
    before, rate, per_token = 0, Fraction(_training_flops(arm, zeros_skipped)), Fraction(1)
    if arm.scratch_teacher_flops and not in_training:
        total = arm.scratch_before.total_zeros_skipped if zeros_skipped else arm.scratch_before.total
        before = (total.tokens if of_tokens else total.flops) or 0  # known, or the pruned arm's were not
        per_token += arm.scratch_teacher_share
        rate += arm.scratch_teacher_share * arm.scratch_teacher_flops
    if amount <= before:
        raise UserError(
            f"{setting} cannot be computed for {arm.name}, which costs less than the scratch arm's teacher alone; "
            "distil both arms, or neither."
        )
    tokens = math.ceil((amount - before) / (per_token if of_tokens else rate))
    steps = -(-tokens // arm.tokens_per_step)
    flops = math.ceil(steps * arm.tokens_per_step * rate)
    return ScratchBudget(setting, spent, tokens, steps, arm.tokens_per_step, flops)


def _training_flops(arm: PrunedArm, zeros_skipped: bool) -> int:
    """Return the FLOPs of one training token, as counted by ``Ledger.charge``."""
    ledger = Ledger()
    masked = arm.masked_parameters
    ledger.charge("training", 1, arm.shape, arm.sequence_length, training=True, masked_parameters=masked)
    return int((ledger.training_zeros_skipped if zeros_skipped else ledger.training).flops or 0)
