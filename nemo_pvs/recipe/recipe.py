"""A recipe: what to prune, how to train it, and what to compare it with."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, model_validator

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.budget import EqualBudget
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.recipe.blocks import Budgets, Calibration, Evaluation, Parent
from nemo_pvs.recipe.data import Data
from nemo_pvs.recipe.distillation import PARENT
from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.recipe.fields import Budget, Initialisation, Parallelism, Positive, RecipeBlock
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.recipe.training import Training

_NAME = re.compile(r"(?![.\s])[^\\/\[\]\x00-\x1f\x7f]+(?<!\s)")
"""Names of targets: no path, and no brackets, which mark styles in what is printed."""
_LONGEST_NAME = 120
"""In bytes: the names of arms and of their records are up to a hundred longer, and file systems allow 255."""


@dataclass(frozen=True)
class Arm:
    """One training run of a comparison."""

    name: str
    """``width-pruned``; with ``budgets`` ``width-pruned-50B`` (R50 in arXiv 2606.14150; ``random``: S50) and
    ``width-random-equal-total-tokens``, followed by ``-50B`` if there are several pruned arms."""
    target: str
    """The key under ``targets``."""
    initialisation: Initialisation
    layout: Parallelism
    training: Training
    """The recipe's ``train`` with this arm's tokens and learning rate."""
    first_token: int
    """First token that the arm reads, in training order; the start of an optimizer step."""
    setting: EqualBudget | None = None
    """The setting that determined the budget, if the recipe gives no number."""

    @property
    def takes_parent(self) -> bool:
        """Whether the initial weights are the parent's, pruned or whole."""
        return self.initialisation == "pruned"

    @property
    def tokens(self) -> int:
        """Tokens of the run, rounded up to whole steps."""
        return self.training.steps * self.training.tokens_per_step


class Recipe(RecipeBlock):
    """Everything that ``pvs run`` needs to know."""

    name: str = Field(min_length=1)
    title: str
    seeds: list[Positive] | None = Field(default=None, min_length=1, exclude_if=lambda given: given is None)
    """Repeat everything with each of these as ``train.seed``, the parent's training included if it has a recipe."""
    parent: Parent
    data: Data
    calibrate: Calibration = Calibration()
    targets: dict[str, Target] = Field(min_length=1)
    arms: list[Initialisation] = Field(default=["pruned", "random"], min_length=1)
    """Initial weights from which each target is trained, unless the target gives its own ``arms``."""
    budgets: Annotated[list[Budget], Field(min_length=1)] | Budgets | None = None
    """Training tokens, one run per budget: a list for all arms, or one for pruned and one for random weights.
    ``budget: equal-total-tokens`` is short for ``train.tokens`` for pruned and this setting for random weights."""
    layout: Parallelism = Parallelism()
    """Layout of every target that does not give its own."""
    train: Training
    evaluate: Evaluation = Evaluation()
    _settled: dict[str, int] = PrivateAttr(default_factory=dict)
    """Tokens of the arms whose budget is a setting, by arm; set by ``equal_terms.settle``."""

    @model_validator(mode="before")
    @classmethod
    def _budget_is_short_for_budgets(cls, values: Any) -> Any:
        budget, train = values.get("budget"), values.get("train")
        if budget is None:
            return values
        if values.get("budgets"):
            raise ValueError("budget and budgets set the same thing; give only one")
        values = {key: value for key, value in values.items() if key != "budget"}
        if not isinstance(train, Mapping) or "tokens" not in train:  # reported when train is validated
            return values
        return {**values, "budgets": {"pruned": [train["tokens"]], "random": [budget]}}

    @model_validator(mode="before")
    @classmethod
    def _budgets_are_the_tokens(cls, values: Any) -> Any:
        """Fill in ``train.tokens`` from ``budgets``; every arm gets a copy of ``train`` with its own budget."""
        budgets, train = values.get("budgets"), values.get("train")
        if not budgets or not isinstance(train, Mapping) or "tokens" in train:
            return values
        for entries in budgets.values() if isinstance(budgets, Mapping) else [budgets]:
            for budget in entries if isinstance(entries, list) else []:
                if budget not in typing.get_args(EqualBudget):
                    return {**values, "train": {**train, "tokens": budget}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _layout_is_for_all_targets(cls, values: Any) -> Any:
        layout, targets = values.get("layout"), values.get("targets")
        if layout is None or not isinstance(targets, Mapping):
            return values
        with_layout = {
            name: {"layout": layout, **target} if isinstance(target, Mapping) else target
            for name, target in targets.items()
        }
        return {**values, "targets": with_layout}

    @model_validator(mode="after")
    def _seeds_differ(self) -> Recipe:
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            twice = next(seed for seed in self.seeds if self.seeds.count(seed) > 1)
            raise ValueError(f"seeds lists {twice} twice; remove one")
        return self

    @model_validator(mode="after")
    def _arms_differ(self) -> Recipe:
        given = {f"targets.{name}.arms": target.arms or [] for name, target in self.targets.items()}
        for key, arms in {"arms": self.arms, **given}.items():
            if len(set(arms)) < len(arms):  # two arms of one name would pass for two repetitions
                raise ValueError(f"{key} lists {arms[0]} twice; remove one")
        return self

    @model_validator(mode="after")
    def _targets_name_folders(self) -> Recipe:
        for name, target in self.targets.items():
            if not _NAME.fullmatch(name) or len(name.encode()) > _LONGEST_NAME:
                raise ValueError(f"a target names folders of the run, and {name!r} cannot; rename it")
            stages = target.stages or 1
            between = [f"{name}-stages", *(f"{name}-stage-{number}" for number in range(1, stages))]
            for taken in [f"{name}.begun", *(between if stages > 1 else ())]:
                if taken in self.targets:
                    raise ValueError(f"targets {taken} and {name} would share files; rename one of them")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> Recipe:
        if not any(
            self.budgets_of(initialisation) for target in self.targets for initialisation in self.arms_of(target)
        ):
            raise ValueError("budgets has none for the arms of any target, so nothing would be trained; give one")
        return self

    @model_validator(mode="after")
    def _budgets_differ(self) -> Recipe:
        for initialisation in typing.get_args(Initialisation):
            budgets = self.budgets_of(initialisation)
            if len(set(budgets)) < len(budgets):  # two arms of one name would pass for two repetitions
                twice = next(budget for budget in budgets if budgets.count(budget) > 1)
                shown = twice if isinstance(twice, str) else f"{twice:,}"
                raise ValueError(f"budgets lists {shown} twice for {initialisation} arms; remove one")
        return self

    @model_validator(mode="after")
    def _parent_can_be_pruned(self) -> Recipe:
        methods = {target.method for target in self.targets.values()}
        arms = {arm for target in self.targets for arm in self.arms_of(target)}
        if not self.parent.has_weights and (methods != {DENSE} or arms != {"random"}):
            raise ValueError(
                f"parent has no source, so it can only be trained; give only targets of method {DENSE}, and "
                "arms: [random]"
            )
        return self

    @model_validator(mode="after")
    def _parent_can_teach(self) -> Recipe:
        distill = self.train.distill
        if distill and distill.teacher == PARENT and not self.parent.has_weights:
            raise ValueError("parent has no source, so it cannot be the teacher; leave train.distill out")
        if distill and not any(self.distills(target, arm) for target in self.targets for arm in self.arms_of(target)):
            raise ValueError("train.distill applies to none of the arms; name one of them in train.distill.arms")
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
        """Tokens that the parent was pretrained on according to the recipe; None if it does not say.

        These are ``parent.pretraining_tokens``, or else the length of ``data.token_ranges.parent`` rounded up to whole
        steps. The parent's ledger, if there is one, is exact.
        """
        tokens = self.data.token_ranges.parent
        if self.parent.pretraining_tokens or tokens is None:
            return int(self.parent.pretraining_tokens) or None
        step = self.train.tokens_per_step
        return -(-int(tokens[1] - tokens[0]) // step) * step

    def arms_of(self, target: str) -> list[Initialisation]:
        """Return the kinds of initial weights from which a target is trained."""
        return self.targets[target].arms or self.arms

    def budgets_of(self, initialisation: Initialisation) -> list[int | EqualBudget]:
        """Return the budgets of arms with this initialisation: tokens, or settings relative to the pruned arms."""
        if self.budgets is None:
            return [int(self.train.tokens)]
        budgets = self.budgets if isinstance(self.budgets, list) else getattr(self.budgets, initialisation)
        entries: Sequence[float | EqualBudget] = budgets
        return [budget if isinstance(budget, str) else int(budget) for budget in entries]

    def _numbers(self, initialisation: Initialisation) -> list[int]:
        return [budget for budget in self.budgets_of(initialisation) if not isinstance(budget, str)]

    def distills(self, target: str, initialisation: Initialisation) -> bool:
        """Return whether a target's arms with this initialisation learn from a teacher."""
        distill = self.train.distill
        return distill is not None and initialisation in distill.arms and self.targets[target].distill

    @property
    def runs(self) -> list[Arm]:
        """Every training run, ordered by target, initialisation and budget.

        Raises:
            UserError: a budget is a setting whose tokens are not known yet (``equal_terms.settle``).
        """
        arms: list[Arm] = []
        for target in self.targets:
            for initialisation in self.arms_of(target):
                arms += self.pruned_runs(target) if initialisation == "pruned" else self._random_runs(target)
        return arms

    def pruned_runs(self, target: str) -> list[Arm]:
        """Return the runs from a target's pruned weights, even if its ``arms`` do not include them."""
        return [self._arm(target, "pruned", self._ending(budget), budget) for budget in self._numbers("pruned")]

    def matched_runs(self, target: str) -> Iterator[tuple[str, EqualBudget, Arm]]:
        """Yield the random arms of a target whose budget is a setting: name, setting and the pruned arm to match."""
        for budget in self.budgets_of("random"):
            if isinstance(budget, str) and "random" in self.arms_of(target):
                yield from self._matched(target, budget)

    def _matched(self, target: str, setting: EqualBudget) -> Iterator[tuple[str, EqualBudget, Arm]]:
        pruned = self.pruned_runs(target)
        for arm, budget in zip(pruned, self._numbers("pruned"), strict=True):
            ending = self._ending(budget) if len(pruned) > 1 else ""
            yield f"{target}-random-{setting}{ending}", setting, arm

    def settled(self, tokens: Mapping[str, int], *, final: bool = True) -> Recipe:
        """Return this recipe with the tokens of all ``matched_runs``, given by name.

        Args:
            tokens: The tokens.
            final: Whether these are the budgets, not numbers on the way to them, which may exceed the range.

        Raises:
            UserError: they exceed the range that random arms may read.
        """
        try:
            self._check_range("random", max(tokens.values(), default=0) if final else 0)
        except ValueError as error:
            raise UserError(f"Recipe {self.name}: {error}.") from None
        copy = self.model_copy()
        copy._settled = dict(tokens)
        return copy

    def _random_runs(self, target: str) -> list[Arm]:
        arms = []
        for budget in self.budgets_of("random"):
            if not isinstance(budget, str):
                arms.append(self._arm(target, "random", self._ending(budget), budget))
                continue
            for name, setting, _ in self._matched(target, budget):
                if name not in self._settled:
                    raise UserError(
                        f"The budget of {name} of recipe {self.name} depends on the cost of pruning, which is not "
                        "known here; give a number of tokens instead."
                    )
                tokens = self._settled[name]
                arms.append(self._arm(target, "random", name.removeprefix(f"{target}-random"), tokens, setting))
        return arms

    def _arm(
        self, target: str, initialisation: Initialisation, ending: str, tokens: int, setting: EqualBudget | None = None
    ) -> Arm:
        peak = self.targets[target].peak(initialisation, self.train.learning_rate)
        distill = self.train.distill if self.distills(target, initialisation) else None
        # A setting's budget is in tokens that are really read, even if the recipe counts budgets in paper steps.
        counted = self.train.model_copy(update={"paper_steps": False}) if setting else self.train
        training = counted.for_budget(tokens).model_copy(update={"learning_rate": peak, "distill": distill})
        first, _ = self.data.token_ranges.of(initialisation)
        return Arm(
            name=f"{target}-{initialisation}{ending}",
            target=target,
            initialisation=initialisation,
            layout=self.targets[target].layout,
            training=training,
            # Whole steps, rounded up like budgets, so that adjacent ranges stay adjacent.
            first_token=-(-first // training.tokens_per_step) * training.tokens_per_step,
            setting=setting,
        )

    def _ending(self, tokens: int) -> str:
        return f"-{_short(tokens)}" if self.budgets else ""


def _short(tokens: int) -> str:
    """Return 50B for 50,000,000,000, but never round."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


_TRAIN = "train.dynamic_loading"


def check_recipe_domains(recipe: Recipe) -> None:
    """Refuse a recipe whose ``dynamic_loading`` and domains do not fit together.

    Raises:
        ValueError: naming the key.
    """
    domains = recipe.data.domains
    for where, loading in _blocks(recipe):
        if not domains:
            raise ValueError(
                f"{where} needs domains, and data has none; give data.token_files.train and validation, or "
                "data.source, by domain"
            )
        loading.check_domains(domains, where)
    if not domains:
        return
    train = recipe.train.dynamic_loading
    if train is None:
        raise ValueError(f"data has domains ({', '.join(domains)}), but nothing sets their shares; add {_TRAIN}")
    for name, target in recipe.targets.items():
        if target.stages:
            raise ValueError(
                f"targets.{name}.stages: rounds of pruning do not work with text in domains; leave stages out"
            )
        options = target.learn or target.pruning_aware
        if options and options.first_token is not None:
            raise ValueError(f"targets.{name}: first_token does not apply to text with domains; leave it out")
        # The arms of such a target begin with the final shares of the training that decides what to prune.
        first = target.method != DENSE and method_named(target.method).trains
        if first and _of_stage(target, train).proportions is None:
            key = _key(name) if target.learn and target.learn.dynamic_loading else _TRAIN
            raise ValueError(f"{key}.proportions is missing, which {name} needs as initial shares; add it")
        if train.proportions is None and not (first and recipe.arms_of(name) == ["pruned"]):
            raise ValueError(f"{_TRAIN}.proportions is missing, which arms of {name} need as initial shares; add it")


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
