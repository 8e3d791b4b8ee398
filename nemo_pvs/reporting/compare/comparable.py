"""Check whether finished runs are comparable, and name the fields in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_pvs.recipe.fields import number
from nemo_pvs.reporting.results import Results, at

if TYPE_CHECKING:
    from nemo_pvs.reporting.compare.runs import Run


_SHAPE_OF = "the shape of "


def differences_of(runs: Sequence[Run]) -> list[str]:
    """Return a clause for every field in which a run differs from the first run that records it, but must not."""
    differences = []
    recorded: dict[tuple[str, str], list[tuple[Run, Any]]] = {}
    traced = all(run.results.parent_origin for run in runs if run.results.parent)
    for run in runs:
        for field, value in {**_fields(run.results), **_parent(run.results, traced)}.items():
            if value is None:
                continue
            known = recorded.setdefault(field, [])
            known.append((run, value))
            first, expected = known[0]
            if field[1].startswith(_SHAPE_OF):  # scores decide the sizes, and each seed has its own
                first, expected = next((one for one in known[:-1] if _seed(one[0]) == _seed(run)), known[0])
                if first.identity == run.identity:
                    continue
            if expected != value:
                what, name = field
                differences.append(
                    f"{what} differs, {name} is {_short(expected)} in {first.label} and {_short(value)} in {run.label}"
                )
    recipes: dict[str, list[Run]] = {}
    for run in runs:
        recipes.setdefault(run.identity, []).append(run)
    first_group, *others = recipes.values()
    # A recipe that is not finished has fewer seeds; gaps are paired by those that it has.
    same = (_seeds(group) <= _seeds(first_group) or _seeds(group) >= _seeds(first_group) for group in others)
    if other := next((group for group, alike in zip(others, same, strict=True) if not alike), None):
        differences.append(
            f"data order differs, its seed is {_listed(first_group)} and {_listed(other)}, and they are not one "
            "recipe repeated with the same seeds"
        )
    return differences


def _seed(run: Run) -> tuple[Any, Any]:
    return run.seed, run.data_seed


def _seeds(runs: Sequence[Run]) -> set[Any]:
    return {run.data_seed for run in runs}


def _listed(runs: Sequence[Run]) -> str:
    return " and ".join(f"{run.data_seed} in {run.label}" for run in runs)


def _fields(results: Results) -> dict[tuple[str, str], Any]:
    """Return what runs must have in common, by kind and name; None if a run does not record it."""
    recipe, hashes = results.recipe, results.hashes
    order = (
        "train.sequence_length",
        "train.global_batch_size",
        "train.dynamic_loading",
        "data.seed",
        "data.token_ranges",
    )
    windows = ("train.validation_samples", "train.sequence_length")
    perplexity = ("evaluate.samples", "evaluate.sequence_length")
    return {
        ("tokenizer", "its SHA-256"): hashes.get("tokenizer"),
        **{("tokenizer", f"the {name}"): value for name, value in hashes.items() if name.startswith("tokenizer of ")},
        ("architecture", "the parent's shape"): str(results.parent.shape) if results.parent else None,
        **{("architecture", f"{_SHAPE_OF}{name}"): str(arms[0].shape) for name, arms in results.targets.items()},
        **{("data order", f"the SHA-256 of {name}"): value for name, value in hashes.items() if _is_training(name)},
        **{("data order", name): at(recipe, *name.split(".")) for name in order},
        ("data order", "the blend of the training files"): _weights(at(recipe, "data", "token_files", "train")),
        ("validation set", "the SHA-256 of its tokens"): hashes.get("validation tokens"),
        **{("validation set", name): at(recipe, *name.split(".")) for name in windows},
        ("test set", "the SHA-256 of its tokens"): hashes.get("test tokens"),
        **{("test set", name): at(recipe, *name.split(".")) for name in perplexity},
    }


def _parent(results: Results, traced: bool) -> dict[tuple[str, str], Any]:
    """Return what identifies the parent: its training without its seeds if known of all runs, or else its weights."""
    if traced:
        return {("parent", "the SHA-256 of its training's recipe"): results.parent_origin}
    return {("parent", "the SHA-256 of its weights"): results.hashes.get("parent weights")}


def _weights(files: Any) -> str | None:
    """Return the weights with which a recipe mixes its training files; None if it has no list of files."""
    if not isinstance(files, (list, tuple)):
        return None
    weights = [value for value in (number(str(entry)) for entry in files) if value is not None]
    return ", ".join(f"{weight:g}" for weight in weights) or "their sizes"


def _is_training(name: str) -> bool:
    return name.startswith("train") and name.endswith(" tokens")


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text
