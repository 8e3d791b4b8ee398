"""Read a recipe from its file and the files that it extends; errors are one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.problems import first_problem
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.files import StrictLoader, expand_home, read_yaml

_BASE = "base.yaml"
"""The name of a file that other recipes in its folder extend and that is not a recipe itself."""


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by path (``my/recipe.yaml``) or by the name of a packaged one (``smollm2_135m/demo``).

    Raises:
        UserError: there is no such recipe, or it is not valid.

    Example:
        >>> import nemo_pvs as pvs
        >>> [arm.name for arm in pvs.load_recipe("smollm2_135m/demo").runs]
        ['width-pruned', 'width-random', 'depth-pruned', 'depth-random']
    """
    path = _path(name_or_path)
    if not path.is_file():
        raise UserError(f"There is no recipe {name_or_path}; known names: {', '.join(packaged_recipes())}.")
    return parse_recipe(_with_parent(_read(path, ()), path), str(path))


def _path(name_or_path: str | Path) -> Path:
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        return Path(name_or_path)
    return Path(str(resources.files("nemo_pvs.recipes").joinpath(f"{name_or_path}.yaml")))


def _relative_to(path: Path, name_or_path: str) -> Path:
    """Return what a recipe in the file ``path`` names: a file relative to it, or a packaged recipe."""
    return path.parent / _path(name_or_path)  # a packaged recipe's path is absolute


def _with_parent(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of a recipe with those of its parent's recipe in place of the latter's path.

    Raises:
        UserError: there is no such recipe, it is not valid, or what it trains is not one model.
    """
    parent = values.get("parent")
    if not isinstance(parent, Mapping):
        return values
    given, sourced = parent.get("recipe"), parent.get("source") is not None
    if sourced and isinstance(given, str):
        raise UserError(
            f"{path}: parent has both a source and a recipe, which trains it; keep one, and write null for the other "
            "where it comes from a recipe that this one extends."
        )
    if sourced or not isinstance(given, (str, Mapping)):
        return values
    where = f"{path}: parent.recipe"
    if isinstance(given, str):
        where = f"{where} {given}"
        if not Path(given).is_file():
            raise UserError(f"{where} does not exist; correct the path.")
        given = _read(Path(given), (path.resolve(),))
    inner = dict(given)
    grandparent = inner.get("parent")
    if isinstance(grandparent, Mapping) and (grandparent.get("recipe") or grandparent.get("source")):
        raise UserError(f"{where} has a parent itself; name a recipe that trains a model from random weights.")
    recipe = parse_recipe(inner, where)
    if len(recipe.runs) != 1:
        raise UserError(f"{where} trains {len(recipe.runs)} models; name a recipe that trains one.")
    if recipe.seeds and not values.get("seeds"):
        raise UserError(f"{where} has seeds, so there are several parents; add the seeds here too.")
    known = {"config": recipe.parent.config, "pretraining_tokens": recipe.runs[0].tokens}
    return {**values, "parent": {**known, **parent, "recipe": inner}}


def _read(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """Return the values of a file merged over those of the file that it ``extends``."""
    if path.resolve() in extended_by:
        raise UserError(f"{path} extends itself through {extended_by[-1].name}; remove one of the two lines.")
    if not path.exists() and extended_by:
        raise UserError(f"{extended_by[-1]} extends {path}, which does not exist; correct the path.")
    values = read_yaml(path, StrictLoader)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is not a recipe: it should hold keys such as parent, data, targets and train.")
    recipe = dict(expand_home(values))
    parent = recipe.get("parent")
    if isinstance(parent, Mapping) and isinstance(parent.get("recipe"), str):
        recipe["parent"] = {**parent, "recipe": str(_relative_to(path, parent["recipe"]))}
    base = recipe.pop("extends", None)
    if base is None:
        return recipe
    if not isinstance(base, str):
        raise UserError(
            f"{path}: extends must be one file, relative to this file's folder, or the name of a packaged recipe, not "
            f"{base!r}."
        )
    return _merge(_read(_relative_to(path, base), (*extended_by, path.resolve())), recipe)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``over``: blocks are merged, other values replaced, null removes the key.

    A learning rate is one value, even if it is written as a mapping: a sweep replaces ``{pruned: ..., random: ...}``.
    """
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "learning_rate":
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_training(values: Mapping[str, Any]) -> Training:
    """Validate training settings given as command-line options.

    Raises:
        UserError: naming the first invalid one.
    """
    try:
        return Training.model_validate(values)
    except ValidationError as error:
        raise UserError(first_problem(error, Training)) from None


def parse_layout(values: Mapping[str, Any]) -> Parallelism:
    """Validate a parallel layout given as command-line options.

    Raises:
        UserError: naming the first invalid one.
    """
    try:
        return Parallelism.model_validate(values)
    except ValidationError as error:
        raise UserError(first_problem(error, Parallelism)) from None


def parse_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Validate the values of a recipe; ``where`` names their file in messages.

    Raises:
        UserError: naming the first invalid key, and the closest known one if it is unknown.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, Recipe)}") from None
    from nemo_pvs.recipe.options import check_options  # takes seconds; misspelt keys are reported before

    for name, target in recipe.targets.items():
        try:
            check_options(target)
        except UserError as error:
            raise UserError(f"{where}: targets.{name}: {error}") from None
    return recipe


def packaged_recipes() -> list[str]:
    """Return the names of the packaged recipes."""
    folder = Path(str(resources.files("nemo_pvs.recipes")))
    files = (file for file in folder.rglob("*.yaml") if file.name != _BASE)
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)
