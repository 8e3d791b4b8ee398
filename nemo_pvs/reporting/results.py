"""Results: what a finished run hands to its report, and the file ``results.json`` that keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.budget import Setting
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.files import read_json, write_json


@dataclass
class Point:
    """The loss at one moment of a training run."""

    step: int
    tokens: int
    """Training tokens seen so far; 0 before the first step."""
    loss: float
    """Mean cross-entropy, nats per token."""
    learning_rate: float | None = None
    """Of the step's update; None for a point of validation."""


@dataclass
class ParentResult:
    """The model that was pruned."""

    name: str
    shape: Shape
    validation_loss: float | None = None
    """Nats per token."""
    test_perplexity: float | None = None
    """exp of the mean cross-entropy per token on the test split."""


@dataclass
class ArmResult:
    """One training run of the comparison."""

    name: str
    """For people: ``width, pruned``."""
    target: str
    """Arms of one target have one shape and are compared with each other: ``width``."""
    method: str
    """How the shape was chosen, or the pruning method: ``minitron-width``."""
    initialisation: Literal["pruned", "random"]
    shape: Shape
    parallel: dict[str, int] = field(default_factory=dict)
    """Ranks by dimension: tensor, pipeline, data."""
    masked_parameters: int = 0
    """Weights that a sparsity mask holds at zero; 0 for a dense model."""
    setting: Setting | None = None
    """What made its budget equal to that of a pruned arm; None where the recipe gives a number."""
    validation: list[Point] = field(default_factory=list)
    training: list[Point] = field(default_factory=list)
    test_perplexity_before: float | None = None
    """Of the model that training starts from, pruned or random."""
    test_perplexity_after: float | None = None
    ledger: Ledger = field(default_factory=Ledger)
    seconds: float | None = None
    """Wall-clock time of the training."""
    tokens_per_second: float | None = None

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss, nats per token."""
        return self.validation[-1].loss if self.validation else None


class Comparison(NamedTuple):
    """A pruned arm beside the one from scratch that has cost the same."""

    setting: Setting
    """What is the same."""
    scratch: ArmResult
    gap: float | None
    """Scratch loss minus pruned loss, nats per token; None if they were not measured."""


@dataclass
class Results:
    """Everything that the report shows. What was not measured is None or empty, never zero."""

    title: str
    recipe_name: str
    recipe: dict[str, Any]
    created: str
    """ISO 8601 with time zone."""
    environment: dict[str, Any]
    hashes: dict[str, str]
    parent: ParentResult | None
    """None where the arms are parents themselves: the run trained a model that was not pruned from another."""
    arms: list[ArmResult]

    @property
    def targets(self) -> dict[str, list[ArmResult]]:
        """The arms by target, in the order in which they were given."""
        return {arm.target: [other for other in self.arms if other.target == arm.target] for arm in self.arms}

    def scratch_of(self, arm: ArmResult, setting: Setting = "equal-training-tokens") -> ArmResult | None:
        """Return the arm from random weights that a pruned arm is to be compared with under a setting.

        It is of the same target, and its training took what the pruned arm's did (``total``: what the pruned arm took
        with its ancestors), to one optimizer step; the nearest if there are several. None if there is none, and for
        an arm from random weights itself.
        """
        if arm.initialisation == "random":
            return None
        others = [other for other in self.targets[arm.target] if other.initialisation == "random"]
        distances = [
            (distance, rank) for rank, other in enumerate(others) if (distance := _apart(arm, other, setting)) <= 1
        ]
        return others[min(distances)[1]] if distances else None

    def comparisons(self, arm: ArmResult) -> list[Comparison]:
        """Return all that a pruned arm can be compared with on equal terms, an arm from scratch under one setting.

        Arms of one shape that are equal in training tokens are so in training FLOPs, too: tokens come first.
        """
        found: dict[str, Comparison] = {}
        for setting in get_args(Setting):
            scratch = self.scratch_of(arm, setting)
            if scratch is not None:
                found.setdefault(scratch.name, Comparison(setting, scratch, self.gap(arm, setting)))
        return list(found.values())

    def gap(self, arm: ArmResult, setting: Setting = "equal-training-tokens") -> float | None:
        """Return scratch loss minus this arm's, in nats per token: positive where the pruned start won.

        Under equal training tokens both are validation losses after the same number of them, the largest at which both
        were measured; under other settings both are the last. None if there are none.
        """
        scratch = self.scratch_of(arm, setting)
        if scratch is None:
            return None
        if setting != "equal-training-tokens":
            ours, theirs = arm.validation_loss, scratch.validation_loss
            return None if ours is None or theirs is None else theirs - ours
        pruned_losses, scratch_losses = (
            {point.tokens: point.loss for point in run.validation} for run in (arm, scratch)
        )
        common = max(pruned_losses.keys() & scratch_losses.keys(), default=0)
        return scratch_losses[common] - pruned_losses[common] if common else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; a loss that is not a finite number becomes its name (``nan``, ``inf``)."""
        data = asdict(self)
        for arm, plain in zip(self.arms, data["arms"], strict=True):
            plain["ledger"] = arm.ledger.to_json()
        return _names_for_non_finite(data)

    @classmethod
    def from_json(cls, data: Any) -> Results:
        """Read what ``to_json`` returned.

        Raises:
            UserError: something is missing or of the wrong type, or a ledger charges less than was seen.
        """
        try:
            data = {**data, "arms": [{**arm, "ledger": {"charges": arm["ledger"]}} for arm in data["arms"]]}
            results = _READER.validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the top level"
            raise UserError(
                f"The results are not those of a finished run: {place}: {first['msg']}; use the file that a run wrote."
            ) from None
        except (KeyError, TypeError) as error:
            raise UserError(
                f"The results are not those of a finished run ({error!r}); use the file that a run wrote."
            ) from None
        for arm in results.arms:
            charged, seen = arm.ledger.training.tokens, max((point.tokens for point in arm.validation), default=0)
            if arm.ledger.charges and charged is not None and charged < seen:
                raise UserError(
                    f"The ledger of {arm.name} does not add up: it charges {charged:,} training tokens, but a "
                    f"loss was measured after {seen:,}; use the file that a run wrote."
                )
        return results

    def save(self, path: Path) -> None:
        """Write ``results.json``."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read the file that ``save`` wrote.

        Raises:
            UserError: the file is missing or holds something else.
        """
        return cls.from_json(read_json(path))


_READER = TypeAdapter(Results)


def _apart(pruned: ArmResult, scratch: ArmResult, setting: Setting) -> float:
    """Return how many optimizer steps of ``scratch`` two arms are from being equal; infinite where it is not known."""
    kind = "tokens" if setting.endswith("tokens") else "flops"
    spent = pruned.ledger.training if setting.startswith("equal-training") else pruned.ledger.total
    took = scratch.ledger.training if setting.startswith("equal-training") else scratch.ledger.total
    ours, theirs = getattr(spent, kind), getattr(took, kind)
    if ours == theirs and ours is not None:
        return 0.0
    charges = [charge for charge in scratch.ledger.charges if charge.activity in ("training", "teacher")]
    a_step = sum((getattr(charge, kind) or 0) / charge.steps for charge in charges if charge.steps)
    if not ours or not theirs or not a_step:
        return math.inf
    return float(abs(ours - theirs) / a_step)


def _names_for_non_finite(value: Any) -> Any:
    """Replace NaN and infinity, for which JSON has no spelling, by strings that ``float`` reads back."""
    if isinstance(value, dict):
        return {key: _names_for_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_names_for_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def at(values: Any, *keys: str) -> Any:
    """Return what stands under nested keys; None where there is no such key."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
