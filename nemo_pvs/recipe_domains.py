"""Whether the domains of a recipe's text and the blocks ``dynamic_loading`` fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from nemo_pvs.recipe.domains import DynamicLoading

if TYPE_CHECKING:
    from nemo_pvs.recipe.recipe import Recipe, Target

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


def describe_domains(recipe: Recipe, parameters: Mapping[str, int]) -> list[str]:
    """Return a line about the shares at the start of each training, and what losses are to come to.

    Args:
        recipe: The recipe.
        parameters: Of each target, by name.
    """
    domains = recipe.data.domains
    lines = []
    for where, how in _blocks(recipe):
        begin = ", ".join(f"{name} {share:.4g}" for name, share in how.shares.items()) or "those of learning masks"
        follows = "follow their losses from the first validation on" if how.kind == "doremi" else "stay"
        lines.append(f"{where}: shares of domains are {begin} at the start and {follows}")
        for name, size in parameters.items():
            if not how.fitted or where not in (_TRAIN, _key(name)):
                continue
            wanted = zip(domains, how.targets(domains, size) or [], strict=True)
            lines.append(f"losses wanted of {name}: {', '.join(f'{domain} {loss:.4f}' for domain, loss in wanted)}")
    return lines


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
