"""The results of a finished run, which its report shows and ``results.json`` stores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.budget import EqualBudget
from nemo_pvs.ledger.ledger import SHARED_ANSWERS, Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.files import read_json, write_json


@dataclass
class Point:
    """The loss at one step of a training run."""

    step: int
    tokens: int
    """Training tokens seen so far; 0 before the first step."""
    loss: float
    """Mean cross-entropy, nats per token."""
    learning_rate: float | None = None
    """Learning rate of the step's update; None for a validation point."""


@dataclass
class ParentResult:
    """The model that was pruned."""

    name: str
    """What the recipe names: a model or a path."""
    shape: Shape
    validation_loss: float | None = None
    """Nats per token."""
    test_perplexity: float | None = None
    """exp of the mean cross-entropy per token on the test split."""
    test_bits_per_byte: float | None = None
    """The same cross-entropy in bits per byte of text, which is comparable between tokenizers."""
    text_losses: dict[str, float] = field(default_factory=dict)
    """Loss on each further text of the recipe (``evaluate.texts``), nats per token."""
    origin: dict[str, Any] | None = None
    """How it was trained, if nemo_pvs did: ``recipe`` (a hash without the seeds), ``seed`` and ``data_seed``."""

    @property
    def label(self) -> str:
        """The name in tables: of a path, only its end."""
        return Path(self.name).name


@dataclass
class SweepResult:
    """The choice of a learning rate, whose trainings are charged to the comparison and not to an arm."""

    kind: str
    """The arms that it is chosen for: ``pruned``, ``sparse random``."""
    target: str
    """The target that was trained with each rate."""
    targets: list[str]
    """The targets whose arms are trained with the chosen rate."""
    rates: list[float]
    losses: list[float]
    """Last validation loss for each rate, nats per token."""
    chosen: float
    tokens: int
    """Training tokens of all candidates together."""
    flops: int
    """Training FLOPs of all candidates together."""

    @property
    def at_the_edge(self) -> bool:
        """Whether a smaller or larger rate than those tried might have been better."""
        return self.chosen in (min(self.rates), max(self.rates))


@dataclass
class ArmResult:
    """One training run of the comparison."""

    name: str
    """For people: ``width, pruned``."""
    target: str
    """Arms of one target have the same shape and are compared with each other: ``width``."""
    method: str
    """How the shape was chosen, or the pruning method: ``minitron-width``."""
    initialisation: Literal["pruned", "random"]
    shape: Shape
    parallel: dict[str, int] = field(default_factory=dict)
    """Ranks by dimension: tensor, pipeline, data."""
    masked_parameters: int = 0
    """Weights that a sparsity mask holds at zero; 0 for a dense model."""
    setting: EqualBudget | None = None
    """How its budget was made equal to that of a pruned arm; None if the recipe gives a number."""
    validation: list[Point] = field(default_factory=list)
    training: list[Point] = field(default_factory=list)
    test_perplexity_before: float | None = None
    """Perplexity of the model that training starts from, pruned or random."""
    test_perplexity_after: float | None = None
    test_bits_per_byte_before: float | None = None
    test_bits_per_byte_after: float | None = None
    text_losses: dict[str, float] = field(default_factory=dict)
    """Loss of the trained model on each further text of the recipe (``evaluate.texts``), nats per token."""
    before_the_end: dict[int, str] = field(default_factory=dict)
    """Fingerprints of the models before and during the training that were evaluated on tasks, by training tokens."""
    ledger: Ledger = field(default_factory=Ledger)
    seconds: float | None = None
    """Wall-clock time of the training."""
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Median model FLOPs utilisation on GPUs."""
    peak_gigabytes: float | None = None
    """Peak memory of rank 0's GPU."""

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss, nats per token."""
        return self.validation[-1].loss if self.validation else None


class Comparison(NamedTuple):
    """A pruned arm compared with the arm from scratch of equal cost."""

    setting: EqualBudget
    """Which cost is equal."""
    scratch: ArmResult
    gap: float | None
    """Scratch loss minus pruned loss, nats per token; None if they were not measured."""


@dataclass
class Results:
    """Everything that the report shows. A value that was not measured is None or empty, never zero."""

    title: str
    recipe_name: str
    recipe: dict[str, Any]
    created: str
    """ISO 8601 with time zone."""
    environment: dict[str, Any]
    hashes: dict[str, str]
    parent: ParentResult | None
    """None if the run only trained models that were not pruned from another."""
    arms: list[ArmResult]
    sweeps: list[SweepResult] = field(default_factory=list)
    """How learning rates were chosen."""
    unfinished: list[str] = field(default_factory=list)
    """Names of the recipe's arms that were not trained yet when this was written."""

    @property
    def parent_origin(self) -> str | None:
        """A hash of how the parent was trained, without its seeds; None if unknown."""
        return self.parent.origin.get("recipe") if self.parent and self.parent.origin else None

    @property
    def all_same_tokens(self) -> bool:
        """Whether the parent and all arms have vocabularies of one size, so that losses per token are comparable."""
        sizes = {arm.shape.vocab for arm in self.arms}
        return len(sizes | ({self.parent.shape.vocab} if self.parent else set())) <= 1

    @property
    def has_bits_per_byte(self) -> bool:
        """Whether bits per byte were measured of any arm."""
        return any(arm.test_bits_per_byte_after is not None for arm in self.arms)

    def same_tokens(self, arm: ArmResult) -> bool:
        """Return whether an arm has the parent's vocabulary, so that their losses per token are comparable."""
        return self.parent is None or arm.shape.vocab == self.parent.shape.vocab

    @property
    def targets(self) -> dict[str, list[ArmResult]]:
        """The arms by target, in their given order."""
        return {arm.target: [other for other in self.arms if other.target == arm.target] for arm in self.arms}

    def scratch_of(self, arm: ArmResult, setting: EqualBudget = "equal-training-tokens") -> ArmResult | None:
        """Return the arm from random weights to compare a pruned arm with under a setting.

        It has the same target, and its training cost equals the pruned arm's (in a ``total`` setting, that of the
        pruned arm with its ancestors) to within one optimizer step; of several the nearest. If none has its total
        tokens, it is one that has them as the paper counts (arXiv 2606.14150): the parent's pretraining and the
        training, without calibration, search and mask learning. None if there is none, and for an arm from random
        weights.
        """
        if arm.initialisation == "random":
            return None
        candidates = []
        for other in self.targets[arm.target]:
            if other.initialisation == "random" and _distance(arm, other, setting) <= 1:
                candidates.append(other)
        if not candidates and setting == "equal-total-tokens":
            return self._scratch_as_published(arm)
        return min(candidates, key=lambda other: _distance(arm, other, setting), default=None)

    def _scratch_as_published(self, arm: ArmResult) -> ArmResult | None:
        """Return the arm from random weights whose pretraining and training are an arm's tokens, within a step.

        Only a teacher brings pretraining to an arm from random weights.
        """
        published = _published_total(arm)
        for other in self.targets[arm.target]:
            total = _published_total(other)
            if other.initialisation != "random" or published is None or not total:
                continue
            step = max((charge.tokens_per_step or 0 for charge in other.ledger.charges), default=0)
            if abs(published - total) <= step:
                return other
        return None

    def leaves_out_calibration(self, arm: ArmResult) -> bool:
        """Whether an arm is equal in total tokens to one from scratch only if counted as published."""
        scratch = self.scratch_of(arm, "equal-total-tokens")
        return scratch is not None and _distance(arm, scratch, "equal-total-tokens") > 1

    def comparisons(self, arm: ArmResult) -> list[Comparison]:
        """Return a pruned arm's comparisons on equal terms, each arm from scratch under one setting only.

        Arms of one shape with equal training tokens also have equal training FLOPs; the setting for tokens is first.
        """
        comparisons: dict[str, Comparison] = {}
        for setting in get_args(EqualBudget):
            scratch = self.scratch_of(arm, setting)
            if scratch is not None:
                comparisons.setdefault(scratch.name, Comparison(setting, scratch, self.gap(arm, setting)))
        return list(comparisons.values())

    def gap(self, arm: ArmResult, setting: EqualBudget = "equal-training-tokens") -> float | None:
        """Return scratch loss minus this arm's loss, in nats per token: positive if the pruned start won.

        At equal training tokens these are validation losses after the same number of tokens, the largest at which both
        were measured; under other settings they are the last ones. None if there are none.
        """
        scratch = self.scratch_of(arm, setting)
        return None if scratch is None else gap_between(arm, scratch, setting)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; a loss that is not finite becomes its name (``nan``, ``inf``)."""
        data = asdict(self)
        for arm, plain in zip(self.arms, data["arms"], strict=True):
            plain["ledger"] = arm.ledger.to_json()
        # What a recipe does not ask for is left out, as in ``recipes/*/results`` and ``tests/unchanged``.
        for name in ("sweeps", "unfinished"):
            if not data[name]:
                del data[name]
        for model in filter(None, (data["parent"], *data["arms"])):
            optional = (
                "text_losses",
                "before_the_end",
                "origin",
                "mfu",
                "peak_gigabytes",
                *(name for name in model if "bits_per" in name),
            )
            for name in optional:
                if name in model and not model[name]:
                    del model[name]
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
            where = ".".join(map(str, first["loc"])) or "the top level"
            raise UserError(
                f"The results are not those of a finished run: {where}: {first['msg']}; use the file that a run wrote."
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


def _distance(pruned: ArmResult, scratch: ArmResult, setting: EqualBudget) -> float:
    """Return the difference in cost of two arms in optimizer steps of ``scratch``; infinite if unknown."""
    kind = "tokens" if setting.endswith("tokens") else "flops"
    pruned_sums = pruned.ledger.training if setting.startswith("equal-training") else pruned.ledger.total
    scratch_sums = scratch.ledger.training if setting.startswith("equal-training") else scratch.ledger.total
    pruned_cost, scratch_cost = getattr(pruned_sums, kind), getattr(scratch_sums, kind)
    if pruned_cost == scratch_cost and pruned_cost is not None:
        return 0.0
    charges = [charge for charge in scratch.ledger.charges if charge.activity in ("training", "teacher")]
    steps = max((charge.steps or 0 for charge in charges), default=0)
    shared = [charge for charge in charges if charge.note == SHARED_ANSWERS]  # without steps of their own
    step_cost = sum((getattr(charge, kind) or 0) / charge.steps for charge in charges if charge.steps)
    step_cost += sum((getattr(charge, kind) or 0) / steps for charge in shared if steps)
    if not pruned_cost or not scratch_cost or not step_cost:
        return math.inf
    return float(abs(pruned_cost - scratch_cost) / step_cost)


def _published_total(arm: ArmResult) -> int | None:
    """Return the tokens of an arm's pretraining and training, which the paper counts; None if unknown."""
    tokens = 0
    for charge in arm.ledger.charges:
        if charge.activity in ("parent pretraining", "training"):
            if charge.tokens is None:
                return None
            tokens += charge.tokens
    return tokens


def gap_between(pruned: ArmResult, scratch: ArmResult, setting: EqualBudget) -> float | None:
    """Return scratch loss minus pruned loss under a setting, as ``Results.gap`` describes it, in nats per token."""
    if setting != "equal-training-tokens":
        pruned_loss, scratch_loss = pruned.validation_loss, scratch.validation_loss
        return None if pruned_loss is None or scratch_loss is None else scratch_loss - pruned_loss
    gaps = gaps_along(pruned, scratch)
    return gaps[max(gaps)] if gaps else None


def gaps_along(pruned: ArmResult, scratch: ArmResult) -> dict[int, float]:
    """Return scratch loss minus pruned loss by training tokens, where both were measured after some training."""
    scratch_losses = {point.tokens: point.loss for point in scratch.validation}
    gaps = {}
    for point in pruned.validation:
        if point.tokens and point.tokens in scratch_losses:
            gaps[point.tokens] = scratch_losses[point.tokens] - point.loss
    return gaps


def _names_for_non_finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, by strings that ``float`` parses."""
    if isinstance(value, dict):
        return {key: _names_for_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_names_for_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def at(values: Any, *keys: str) -> Any:
    """Return the value under nested keys; None if there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
