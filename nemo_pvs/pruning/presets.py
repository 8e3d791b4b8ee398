"""Published target architectures by name (``presets.yaml``), so that a comparison starts from the same sizes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape


@dataclass(frozen=True)
class TargetPreset:
    """One published target and the model that it was pruned from."""

    name: str
    """Family and name, ``llama31_8b/4b-depth``."""
    method: str
    ratio: float | None
    """The share of the parent that the publication says to remove; see ``presets.yaml`` for its denominator."""
    parent: Shape
    target: Shape
    parameters: int
    """Expected parameters of the target, recorded separately so that a mistake in the sizes is noticed."""


@cache
def target_presets() -> Mapping[str, TargetPreset]:
    """Return every preset by its full name."""
    families = yaml.safe_load(resources.files("nemo_pvs.pruning").joinpath("presets.yaml").read_text())
    by_name = {}
    for family, values in families.items():
        parent = Shape(**values["parent"])
        for name, target in values["targets"].items():
            full = f"{family}/{name}"
            shape = parent.replace(**target["sizes"])
            by_name[full] = TargetPreset(
                full, target["method"], target.get("ratio"), parent, shape, target["parameters"]
            )
    return by_name


def find_preset(name: str, parent: Shape) -> TargetPreset:
    """Return a preset by its full name or, if only one family has it, by its last part.

    Args:
        name: ``llama31_8b/4b-depth`` or ``4b-depth``.
        parent: The model that is to be pruned.

    Raises:
        UserError: there is no such preset, several families have it, or it is for another model.
    """
    known = target_presets()
    matches = [preset for full, preset in known.items() if name in (full, full.split("/")[1])]
    if not matches:
        near = difflib.get_close_matches(name, [*known, *(full.split("/")[1] for full in known)], n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
        raise UserError(f"There is no preset {name!r}; {hint}")
    if len(matches) > 1:
        raise UserError(
            f"The preset {name!r} exists as {' and '.join(preset.name for preset in matches)}; give one of them."
        )
    preset = matches[0]
    if preset.parent != parent:
        raise UserError(
            f"The preset {preset.name} is for a model of [{preset.parent}], but this one is [{parent}]; "
            "give --ratio or --target."
        )
    return preset
