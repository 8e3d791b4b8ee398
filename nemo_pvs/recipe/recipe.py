"""Recipe: a YAML file that says what to prune, how to train it and what to compare it with."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.budget import Setting
from nemo_pvs.recipe.blocks import Budgets, Calibration, Evaluation, Parent
from nemo_pvs.recipe.data import Data
from nemo_pvs.recipe.distillation import PARENT
from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.recipe.fields import Block, Initialisation, Parallelism, Tokens
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.recipe.training import Training


@dataclass(frozen=True)
class Arm:
    """One training run of a comparison."""

    name: str
    """``width-pruned``; with ``budgets`` ``width-pruned-50B``: R50 of the paper (``random``: S50), and
    ``width-random-equal-total-tokens``, with ``-50B`` behind it where there are several pruned arms."""
    target: str
    """The key under ``targets``."""
    initialisation: Initialisation
    layout: Parallelism
    training: Training
    """With this arm's tokens and learning rate."""
    first_token: int
    """Where in the training data it starts to read, in the order of training; the start of an optimizer step."""
    setting: Setting | None = None
    """What made its budget, if that is not a number of the recipe."""

    @property
    def takes_parent(self) -> bool:
        """Whether its initial weights are the parent's, pruned or whole."""
        return self.initialisation == "pruned"

    @property
    def tokens(self) -> int:
        """Tokens of the run, exactly: whole steps."""
        return self.training.steps * self.training.tokens_per_step


class Recipe(Block):
    """Everything that ``pvs run`` needs to know."""

    name: str
    title: str
    parent: Parent
    data: Data
    calibrate: Calibration = Calibration()
    targets: dict[str, Target] = Field(min_length=1)
    arms: list[Initialisation] = Field(default=["pruned", "random"], min_length=1)
    """Initial weights to train every target from that names none of its own."""
    budgets: list[Tokens] | Budgets | None = None
    """Training tokens, one run for each; a list for all arms, or one for pruned and one for random weights.
    ``budget: equal-total-tokens`` is short for ``train.tokens`` for pruned and this setting for random weights."""
    layout: Parallelism = Parallelism()
    """Of every target that has none of its own."""
    train: Training
    evaluate: Evaluation = Evaluation()
    _settled: dict[str, int] = PrivateAttr(default_factory=dict)
    """Tokens of the arms whose budget is a setting, by name; see ``equal_terms.settle``."""

    @model_validator(mode="before")
    @classmethod
    def _budget_is_short_for_budgets(cls, values: Any) -> Any:
        budget, train = values.get("budget"), values.get("train")
        if budget is None:
            return values
        if values.get("budgets"):
            raise ValueError("budget and budgets say the same thing; give only one")
        values = {key: value for key, value in values.items() if key != "budget"}
        if not isinstance(train, Mapping) or "tokens" not in train:  # which is said when train is read
            return values
        return {**values, "budgets": {"pruned": [train["tokens"]], "random": [budget]}}

    @model_validator(mode="before")
    @classmethod
    def _budgets_are_the_tokens(cls, values: Any) -> Any:
        """Let ``budgets`` stand for ``train.tokens``, of which every arm gets a copy with its own."""
        budgets, train = values.get("budgets"), values.get("train")
        if not budgets or not isinstance(train, Mapping) or "tokens" in train:
            return values
        lists = budgets.values() if isinstance(budgets, Mapping) else [budgets]
        given = (budget for one in lists if isinstance(one, list) for budget in one)
        some = next((budget for budget in given if budget not in typing.get_args(Setting)), None)
        return values if some is None else {**values, "train": {**train, "tokens": some}}

    @model_validator(mode="before")
    @classmethod
    def _layout_is_for_all_targets(cls, values: Any) -> Any:
        layout, targets = values.get("layout"), values.get("targets")
        if layout is None or not isinstance(targets, Mapping):
            return values
        given = {
            name: {"layout": layout, **target} if isinstance(target, Mapping) else target
            for name, target in targets.items()
        }
        return {**values, "targets": given}

    @model_validator(mode="after")
    def _parent_can_be_pruned(self) -> Recipe:
        methods = {target.method for target in self.targets.values()}
        arms = {arm for target in self.targets for arm in self.arms_of(target)}
        if self.parent.source is None and (methods != {DENSE} or arms != {"random"}):
            raise ValueError(
                f"parent has no source, so all that can be done is to train it: targets of method {DENSE}, "
                "and arms: [random]"
            )
        return self

    @model_validator(mode="after")
    def _parent_can_teach(self) -> Recipe:
        distill = self.train.distill
        if distill and distill.teacher == PARENT and self.parent.source is None:
            raise ValueError("parent has no source, so it cannot be the teacher; leave train.distill out")
        if distill and not any(self.distills(target, arm) for target in self.targets for arm in self.arms_of(target)):
            raise ValueError("train.distill is for none of the arms; name one of them in train.distill.arms")
        return self

    @model_validator(mode="after")
    def _ranges_hold_the_budgets(self) -> Recipe:
        for initialisation in sorted({arm for target in self.targets for arm in self.arms_of(target)}):
            budgets = [self.train.for_budget(budget).tokens for budget in self._numbers(initialisation)]
            self._check_range(initialisation, int(max(budgets, default=0)))
        return self

    @model_validator(mode="after")
    def _domains_are_loaded(self) -> Recipe:
        check_recipe_domains(self)
        return self

    def _check_range(self, initialisation: Initialisation, tokens: int) -> None:
        first, end = self.data.token_ranges.of(initialisation)
        if first + tokens > end:
            raise ValueError(
                f"a budget of {tokens:,} tokens for {initialisation} arms goes past the end of their range "
                f"({first:,} to {end:,.0f}) in data.token_ranges"
            )

    @property
    def parent_tokens(self) -> int | None:
        """Tokens that the parent was pretrained on as far as the recipe says; None where it does not.

        Without a declaration they are those of the range ``data.token_ranges.parent``, in whole steps, as a run trains
        on it. What the parent's ledger counts, where there is one, is exact.
        """
        given = self.data.token_ranges.parent
        if self.parent.pretraining_tokens or given is None:
            return int(self.parent.pretraining_tokens) or None
        step = self.train.tokens_per_step
        return -(-int(given[1] - given[0]) // step) * step

    def arms_of(self, target: str) -> list[Initialisation]:
        """Return the initial weights that a target is trained from."""
        return self.targets[target].arms or self.arms

    def budgets_of(self, initialisation: Initialisation) -> list[int | Setting]:
        """Return what arms of a kind are trained for: tokens, or what makes them equal to the pruned arms."""
        if self.budgets is None:
            return [int(self.train.tokens)]
        budgets = self.budgets if isinstance(self.budgets, list) else getattr(self.budgets, initialisation)
        given: Sequence[float | Setting] = budgets
        return [budget if isinstance(budget, str) else int(budget) for budget in given]

    def _numbers(self, initialisation: Initialisation) -> list[int]:
        return [budget for budget in self.budgets_of(initialisation) if not isinstance(budget, str)]

    def distills(self, target: str, initialisation: Initialisation) -> bool:
        """Return whether arms of a kind learn from a teacher."""
        distill = self.train.distill
        return distill is not None and initialisation in distill.arms and self.targets[target].distill

    @property
    def runs(self) -> list[Arm]:
        """Every training run: target by target, initial weights by initial weights, budget by budget.

        Raises:
            UserError: a budget is a setting, and nobody has worked out its tokens yet (``equal_terms.settle``).
        """
        return [
            arm
            for target in self.targets
            for initialisation in self.arms_of(target)
            for arm in (self.pruned_runs(target) if initialisation == "pruned" else self._random_runs(target))
        ]

    def pruned_runs(self, target: str) -> list[Arm]:
        """Return the runs from a target's pruned weights, whether or not they are among ``arms``."""
        return [self._arm(target, "pruned", self._ending(budget), budget) for budget in self._numbers("pruned")]

    def matched_runs(self, target: str) -> Iterator[tuple[str, Setting, Arm]]:
        """Yield the random arms of a target whose budget is a setting: name, setting, the pruned arm to equal."""
        for budget in self.budgets_of("random"):
            if isinstance(budget, str) and "random" in self.arms_of(target):
                yield from self._matched(target, budget)

    def _matched(self, target: str, setting: Setting) -> Iterator[tuple[str, Setting, Arm]]:
        pruned = self.pruned_runs(target)
        for arm, budget in zip(pruned, self._numbers("pruned"), strict=True):
            ending = self._ending(budget) if len(pruned) > 1 else ""
            yield f"{target}-random-{setting}{ending}", setting, arm

    def settled(self, tokens: Mapping[str, int]) -> Recipe:
        """Return this recipe with the tokens of all ``matched_runs``, by name.

        Raises:
            UserError: they go past the end of the range that random arms may read.
        """
        try:
            self._check_range("random", max(tokens.values(), default=0))
        except ValueError as error:
            raise UserError(f"Recipe {self.name}: {error}.") from None
        copy = self.model_copy()
        copy._settled = dict(tokens)
        return copy

    def _random_runs(self, target: str) -> list[Arm]:
        found = []
        for budget in self.budgets_of("random"):
            if not isinstance(budget, str):
                found.append(self._arm(target, "random", self._ending(budget), budget))
                continue
            for name, setting, _ in self._matched(target, budget):
                if name not in self._settled:
                    raise UserError(
                        f"How long {name} of recipe {self.name} is trained depends on what pruning costs, which is "
                        "not worked out here; give a number of tokens instead."
                    )
                tokens = self._settled[name]
                found.append(self._arm(target, "random", name.removeprefix(f"{target}-random"), tokens, setting))
        return found

    def _arm(
        self, target: str, initialisation: Initialisation, ending: str, tokens: int, setting: Setting | None = None
    ) -> Arm:
        peak = self.targets[target].peak(initialisation, self.train.learning_rate)
        distill = self.train.distill if self.distills(target, initialisation) else None
        # What a setting makes equal is counted in tokens that are seen, whatever budgets are counted in.
        counted = self.train.model_copy(update={"paper_steps": False}) if setting else self.train
        training = counted.for_budget(tokens).model_copy(update={"learning_rate": peak, "distill": distill})
        first, _ = self.data.token_ranges.of(initialisation)
        return Arm(
            name=f"{target}-{initialisation}{ending}",
            target=target,
            initialisation=initialisation,
            layout=self.targets[target].layout,
            training=training,
            # Whole steps, rounded up as budgets are, so that neighbouring ranges stay neighbours.
            first_token=-(-first // training.tokens_per_step) * training.tokens_per_step,
            setting=setting,
        )

    def _ending(self, tokens: int) -> str:
        return f"-{_short(tokens)}" if self.budgets else ""


def _short(tokens: int) -> str:
    """Return 50B for 50,000,000,000, never a rounded number."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


_TRAINED_FIRST = ("sheared-llama", "efficient-llm")
"""Methods that train the parent before the arms, and hand on the shares that this ends with."""


_TRAIN = "train.dynamic_loading"


def check_recipe_domains(recipe: Recipe) -> None:
    """Refuse a recipe that does not say how its domains are loaded, or says it of one text.

    Raises:
        ValueError: naming the key.
    """
    domains = recipe.data.domains
    for where, how in _blocks(recipe):
        if not domains:
            raise ValueError(
                f"{where} is about domains, and data has none; give data.token_files.train and validation, or "
                "data.source, by domain"
            )
        how.check_domains(domains, where)
    if not domains:
        return
    train = recipe.train.dynamic_loading
    if train is None:
        raise ValueError(f"data has domains ({', '.join(domains)}), and nothing says their shares; add {_TRAIN}")
    for name, target in recipe.targets.items():
        if target.stages:
            raise ValueError(f"targets.{name}.stages: targets with stages are trained on one text, not on domains")
        own = target.learn or target.pruning_aware
        if own and own.first_token is not None:
            raise ValueError(f"targets.{name}: first_token is a place in one text, not in domains; leave it out")
        first = target.method in _TRAINED_FIRST
        if first and _of_stage(target, train).proportions is None:
            raise ValueError(f"{_TRAIN}.proportions is missing, with which {name} begins; add it, or under learn")
        if train.proportions is None and not (first and recipe.arms_of(name) == ["pruned"]):
            raise ValueError(f"{_TRAIN}.proportions is missing, with which arms of {name} begin; add it")


def _key(target: str) -> str:
    return f"targets.{target}.learn.dynamic_loading"


def _blocks(recipe: Recipe) -> Iterator[tuple[str, DynamicLoading]]:
    if recipe.train.dynamic_loading:
        yield _TRAIN, recipe.train.dynamic_loading
    for name, target in recipe.targets.items():
        if target.learn and target.learn.dynamic_loading:
            yield _key(name), target.learn.dynamic_loading


def _of_stage(target: Target, default: DynamicLoading) -> DynamicLoading:
    return (target.learn and target.learn.dynamic_loading) or default
