"""The runs that one recipe stands for: its parents' runs, the sweep of its learning rates, and a run per seed.

Each is an ordinary recipe with its own run folder, so it is resumed, launched and reported like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.blocks import Budgets, Evaluation
from nemo_pvs.recipe.fields import Initialisation
from nemo_pvs.recipe.options import is_sparse
from nemo_pvs.recipe.rates import Rates, Sweep, peak_of
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.system.files import sha256_json

PARENTS = "parents"
"""Folder next to a run folder with the parents that recipes train, which other recipes there reuse."""


@dataclass(frozen=True)
class Member:
    """One run of a series."""

    recipe: Recipe
    """The recipe of this run; its rates may still have to be chosen."""
    folder: Path
    sweep: Path | None = None
    """Run folder of the sweep in which the rates of this recipe are chosen."""


Phase = tuple[Member, ...]
"""Runs that do not depend on each other; every run of the phases before is done."""


@dataclass(frozen=True)
class Kind:
    """The arms of a recipe for which one learning rate is chosen: equal initial weights, all dense or all sparse."""

    name: str
    """For people: ``pruned``, ``sparse random``, ``distilled pruned``."""
    target: str
    """The first target, whose arm is trained with each rate."""
    initialisation: Initialisation
    sweep: Sweep
    targets: tuple[str, ...]
    """All targets whose arms get the chosen rate."""

    def candidate(self, rate: float) -> str:
        """Return the name of the target that is trained with a rate in the sweep."""
        return f"{self.target}-{self.initialisation}-{rate:g}"


def is_one_run(recipe: Recipe) -> bool:
    """Return whether a recipe stands for itself alone: no seeds, no parent to train first, no rates to choose."""
    return not (recipe.seeds or parent_recipe(recipe) or swept_kinds(recipe))


def phases(recipe: Recipe, folder: Path) -> list[Phase]:
    """Return the runs of a recipe in order; for a plain recipe one phase with one run, in ``folder`` itself.

    With ``seeds`` the runs are in ``folder/seed-N``, and a sweep is in ``folder/sweep``. Parents are in ``parents``
    next to ``folder``, under their recipe's name and a hash of its settings, so that recipes that need the same parent
    train it once.
    """
    return _phases(recipe, lambda one: folder / f"seed-{one.train.seed}" if recipe.seeds else folder, folder)


def _phases(recipe: Recipe, folder_of: Callable[[Recipe], Path], folder: Path) -> list[Phase]:
    done: list[Phase] = []
    runs = [of_seed(recipe, seed) for seed in recipe.seeds] if recipe.seeds else [recipe]
    parent = parent_recipe(recipe)
    if parent is not None:
        root = folder.parent / PARENTS
        first = of_seed(parent, parent.seeds[0]) if parent.seeds else parent
        first_seed = first.train.seed
        done += _phases(
            parent, lambda one: root / _parent_name(one, first_seed), root / _parent_name(first, first_seed)
        )
        runs = [_with_parent(run, member) for run, member in zip(runs, done[-1], strict=True)]
    sweep = folder / "sweep" if swept_kinds(recipe) else None
    if sweep is not None:
        done.append((Member(candidates(runs[0]), sweep),))
    return [*done, tuple(Member(run, folder_of(run), sweep) for run in runs)]


def of_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return the recipe of one of its seeds."""
    return recipe.model_copy(update={"seeds": None, "train": recipe.train.model_copy(update={"seed": seed})})


def parent_recipe(recipe: Recipe) -> Recipe | None:
    """Return the recipe that trains the parent, with the same seeds; None if the parent is given."""
    if recipe.parent.recipe is None or recipe.parent.source is not None:
        return None
    parent = Recipe.model_validate(recipe.parent.recipe)
    return parent.model_copy(update={"seeds": recipe.seeds}) if recipe.seeds else parent


def _parent_name(recipe: Recipe, first_seed: int) -> str:
    """Return the name of a parent's run folder: equal for trainings that give equal weights.

    Args:
        recipe: The recipe of one seed.
        first_seed: The seed with which its learning rate is chosen, if it is.
    """
    (arm,) = recipe.runs
    settings = {
        "config": recipe.parent.config,
        "tokenizer": recipe.parent.tokenizer,
        "data": recipe.data.model_dump(mode="json", exclude={"token_ranges"}),
        "first_token": arm.first_token,
        "initialisation": arm.training.initialisation,
        "training": arm.training.identity,
        **({"rate of seed": first_seed} if swept_kinds(recipe) else {}),
    }
    return f"{recipe.name}-{sha256_json(settings)[:10]}"


def _with_parent(recipe: Recipe, parent: Member) -> Recipe:
    (arm,) = parent.recipe.runs
    source = str(parent.folder / "models" / arm.name)
    return recipe.model_copy(update={"parent": recipe.parent.model_copy(update={"source": source})})


def swept_kinds(recipe: Recipe) -> list[Kind]:
    """Return the kinds of arms whose learning rates must be chosen."""
    groups: dict[str, Kind] = {}
    for name, target in recipe.targets.items():
        for initialisation in recipe.arms_of(name):
            if not recipe.budgets_of(initialisation):
                continue
            sweep = target.peak(initialisation, recipe.train.learning_rate)
            if not isinstance(sweep, Sweep):
                continue
            words = ["distilled"] * recipe.distills(name, initialisation) + ["sparse"] * is_sparse(target)
            kind = " ".join([*words, initialisation])
            key = f"{kind} {sweep.model_dump()}"
            group = groups.get(key, Kind(kind, name, initialisation, sweep, ()))
            groups[key] = replace(group, targets=(*group.targets, name))
    return list(groups.values())


def candidates(recipe: Recipe) -> Recipe:
    """Return the recipe of a sweep: the first target of each kind, trained with each of its rates."""
    targets, budgets = {}, Budgets()
    for kind in swept_kinds(recipe):
        for rate in kind.sweep.sweep:
            changes = {"learning_rate": rate, "arms": [kind.initialisation]}
            targets[kind.candidate(rate)] = recipe.targets[kind.target].model_copy(update=changes)
        tokens = sweep_tokens(recipe, kind)
        if getattr(budgets, kind.initialisation) not in ([], [tokens]):
            raise UserError(
                f"Recipe {recipe.name}: the sweeps of {kind.initialisation} arms have different tokens; give all of "
                "them the same."
            )
        first, end = recipe.data.token_ranges.of(kind.initialisation)
        read = int(recipe.train.for_budget(tokens).tokens)
        if first + read > end:
            raise UserError(
                f"Recipe {recipe.name}: the sweep of {kind.name} arms reads {read:,} tokens, past the end of their "
                f"range ({first:,} to {end:,.0f}); give the sweep fewer tokens."
            )
        budgets = budgets.model_copy(update={kind.initialisation: [tokens]})
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}_sweep",
            "title": f"{recipe.title}: learning rates",
            "targets": targets,
            "budgets": budgets,
            # A rate of no target, as each has its own.
            "train": recipe.train.model_copy(update={"learning_rate": swept_kinds(recipe)[0].sweep.sweep[0]}),
            "evaluate": Evaluation(**recipe.evaluate.model_dump(include={"samples", "sequence_length"})),
        }
    )


def sweep_tokens(recipe: Recipe, kind: Kind) -> int:
    """Return the training tokens of the candidates of a kind, counted as in ``budgets``."""
    if kind.sweep.tokens is not None:
        return int(kind.sweep.tokens)
    numbers = [budget for budget in recipe.budgets_of(kind.initialisation) if not isinstance(budget, str)]
    if not numbers and recipe.train.paper_steps:  # in whose labels the tokens of arms are more
        numbers = [budget for budget in recipe.budgets_of("pruned") if not isinstance(budget, str)]
    return max(numbers or [arm.tokens for arm in recipe.pruned_runs(kind.target)])


def with_rates(recipe: Recipe, rates: Sequence[float]) -> Recipe:
    """Return a recipe with the chosen learning rates, given in the order of ``swept_kinds``."""
    if not rates:
        return recipe
    swept = swept_kinds(recipe)
    chosen = {}
    for kind, rate in zip(swept, rates, strict=True):
        chosen.update({(name, kind.initialisation): rate for name in kind.targets})
    train = recipe.train
    if isinstance(peak_of(train.learning_rate, "pruned"), Sweep):  # for trainings that are not arms
        default = next((rate for (_, initialisation), rate in chosen.items() if initialisation == "pruned"), rates[0])
        train = train.model_copy(update={"learning_rate": default})
    targets = {}
    for name, target in recipe.targets.items():
        peaks = {}
        for initialisation in ("pruned", "random"):
            given = target.peak(initialisation, recipe.train.learning_rate)
            unused = train.peak_learning_rate if isinstance(given, Sweep) else given
            peaks[initialisation] = chosen.get((name, initialisation), unused)
        targets[name] = target.model_copy(update={"learning_rate": Rates(**peaks)})
    return recipe.model_copy(update={"train": train, "targets": targets})
