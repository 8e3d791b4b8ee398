"""What two runs of one recipe with different seeds have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.manifest import ORIGIN
from nemo_pvs.model.megatron_run import latest_checkpoint
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.system.files import read_json, sha256_json


def identity_without_seeds(recipe: Mapping[str, Any], origin: str | None = None) -> str:
    """Return a hash that is equal for recipes, as plain data, that differ only in their seeds.

    Null keys count as absent, because the runs in ``recipes/*/results`` lack keys that recipes have gained since.

    Args:
        recipe: The values of a recipe.
        origin: The identity of the recipe that trained the parent, if known; it then stands for the parent.
    """
    values = {key: value for key, value in recipe.items() if key not in ("name", "title", "seeds")}
    if isinstance(train := values.get("train"), Mapping):
        values["train"] = {key: value for key, value in train.items() if key not in ("seed", "data_seed")}
    if origin is not None:
        values["parent"] = {"origin": origin}
    return sha256_json(_without_nulls(values))


def origin_of(recipe: Recipe, arm: str, parent: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return where a trained model comes from, which is stored next to it.

    Args:
        recipe: The recipe.
        arm: The name of the arm.
        parent: Where the parent comes from, if known.
    """
    values = recipe.model_dump(mode="json", exclude={"targets", "arms", "budgets", "evaluate", "layout"})
    (target,) = {run.target for run in recipe.runs if run.name == arm}
    values["target"] = recipe.targets[target].model_dump(mode="json", exclude={"layout"})
    identity = identity_without_seeds({**values, "arm": arm}, None if parent is None else parent["recipe"])
    return {"recipe": identity, "seed": recipe.train.seed, "data_seed": recipe.train.order_seed}


def read_origin(checkpoint: Path) -> dict[str, Any] | None:
    """Return how nemo_pvs trained a checkpoint; None if it did not."""
    file = latest_checkpoint(checkpoint) / ORIGIN
    return read_json(file) if file.is_file() else None


def _without_nulls(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _without_nulls(value) for key, value in values.items() if value is not None}
    return [_without_nulls(value) for value in values] if isinstance(values, (list, tuple)) else values
