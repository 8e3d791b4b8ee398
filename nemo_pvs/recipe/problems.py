"""Turn a validation error of a recipe or a launch profile into one sentence that names the key."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nemo_pvs.recipe.fields import RecipeBlock

_UNION_TAGS = {"Rates", "Sweep", "Budgets", "constrained-float", "float", "str", "local", "slurm"}


def first_problem(error: ValidationError, block: type[RecipeBlock]) -> str:
    """Return the first problem with the values of a block; an unknown key comes before all others."""
    problems = error.errors()
    first = _keys(problems[0])
    # Of a union's alternatives the user most likely meant the one that validates deepest; our own messages say most.
    candidates = [problem for problem in problems if _keys(problem)[: len(first)] == first]
    deepest = max(candidates, key=lambda problem: (len(_keys(problem)), problem["type"] == "value_error"))
    problem = next((problem for problem in problems if problem["type"] == "extra_forbidden"), deepest)
    keys = _keys(problem)
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        known = list(_block_at(keys[:-1], block).model_fields)
        nearest = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.4)
        return f"unknown key {key}; " + (
            f"did you mean {nearest[0]}?" if nearest else f"known keys are {', '.join(known)}."
        )
    if problem["type"] == "missing":
        return f"{key} is missing; add it."
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = "" if isinstance(given, (Mapping, RecipeBlock)) else f", not {given!r}"
    return f"{key or 'recipe'}: {message[0].lower()}{message[1:]}{shown}."


def _keys(problem: ErrorDetails) -> list[str]:
    """Return the path of keys to a problem, without pydantic's labels for the alternatives of a union."""
    keys = [str(key) for key in problem["loc"]]
    return [key for key in keys if key not in _UNION_TAGS and "[" not in key]


def _block_at(keys: list[str], block: type[RecipeBlock]) -> type[RecipeBlock]:
    """Return the class of the block under ``keys``; names chosen by the user (of targets) are skipped."""
    for key in keys:
        if key in block.model_fields:
            block = next(_blocks_in(block.model_fields[key].annotation), block)
    return block


def _blocks_in(annotation: Any) -> typing.Iterator[type[RecipeBlock]]:
    if inspect.isclass(annotation) and issubclass(annotation, RecipeBlock):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _blocks_in(argument)
