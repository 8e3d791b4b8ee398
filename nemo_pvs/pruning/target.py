"""The target shape of pruning, given by sizes (``hidden=384,ffn=1024``), a ratio to remove, or a published name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.options import SIZES, TARGET_SIZES, VOCAB, Options
from nemo_pvs.pruning.presets import find_preset
from nemo_pvs.system.files import read_json, write_json

DENOMINATORS = ("body", "total")
"""What a ratio is a share of: ``body``, the decoder layers with the final norm, or ``total``, all parameters."""

_SEARCH = "search"
_RATIO_AXES = {"minitron-depth": "depth", "shortgpt": "depth", "minitron-width": "width"}
_TOLERANCE = 0.05
"""Largest difference between the ratio and the share that a target removes."""


def choose_target(
    parent: Shape,
    method: str,
    *,
    sizes: Mapping[str, int] | None = None,
    ratio: float | None = None,
    of: str = "body",
    preset: str | None = None,
) -> Shape:
    """Return the target Shape, given exactly one of sizes, a ratio and a preset.

    Args:
        parent: The model that is to be pruned.
        method: Name of the pruning method.
        sizes: New sizes by name (one of ``SIZES``); the others stay as they are.
        ratio: Share to remove, between 0 and 1.
        of: What the ratio is a share of, ``body`` or ``total``.
        preset: Name of a published target.

    Raises:
        UserError: none or several are given, or the one given does not suit the model.
    """
    options = {"--target": sizes or None, "--ratio": ratio, "--preset": preset}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        who = f"{' and '.join(given)} say" if given else "Nothing says"
        raise UserError(
            f"{who} what to prune to; give one of --target hidden=384,ffn=1024, --ratio 0.5 and --preset 4b-depth."
        )
    if preset is not None:
        return find_preset(preset, parent).target
    if ratio is not None:
        return target_for_ratio(parent, ratio, method, of)
    assert sizes is not None
    return with_sizes(parent, sizes)


def parse_sizes(text: str) -> dict[str, int]:
    """Return the sizes in a text such as ``hidden=384,ffn=1024``.

    Raises:
        UserError: a size is unknown, given twice, or not a number.
    """
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        name, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals:
            raise UserError(f"The target {text!r} has {pair.strip()!r} where size=number is needed, e.g. hidden=384.")
        _check_name(name, f"The target {text!r}")
        if name in sizes:
            raise UserError(f"The target {text!r} gives {name} twice; give it once.")
        if not value.isdecimal():
            raise UserError(f"The target {text!r} needs a whole number for {name}, not {value!r}.")
        sizes[name] = int(value)
    return sizes


def with_sizes(parent: Shape, sizes: Mapping[str, int]) -> Shape:
    """Return the parent's Shape with other sizes; query heads follow the KV groups unless their number is given.

    Raises:
        UserError: a size is larger than the parent's or less than 1, or the query heads do not suit the KV groups.
    """
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    for name, size in sizes.items():
        largest = getattr(parent, name)
        if size < 1:
            raise UserError(f"The target {text!r} leaves nothing of {name}; choose from 1 to {largest}.")
        if size > largest:
            raise UserError(
                f"The target {text!r} asks for {name}={size}, but the model has {largest}; pruning only removes."
            )
    if "heads" in sizes:
        _check_heads(parent, sizes, text)
    return parent.replace(**sizes)


def with_vocabulary(shape: Shape, options: Options) -> Shape:
    """Return a target's Shape with the vocabulary that its options ask for, if any.

    Raises:
        UserError: the vocabulary is larger than the model's.
    """
    size = getattr(options, VOCAB, None)
    return shape if size is None else with_sizes(shape, {VOCAB: size})


def _check_heads(parent: Shape, sizes: Mapping[str, int], text: str) -> None:
    """Raise UserError unless every KV group that is kept can keep the same number of its query heads."""
    heads, groups = sizes["heads"], sizes.get("kv_groups", parent.kv_groups)
    if heads % groups or heads > groups * parent.heads_per_group:
        legal = [groups * heads_per_group for heads_per_group in range(1, parent.heads_per_group + 1)]
        raise UserError(
            f"The target {text!r} leaves {heads} query heads in {groups} KV groups, but every group keeps the same "
            f"number, at most {parent.heads_per_group}; choose heads={' or '.join(map(str, legal))}, or another "
            "number of kv_groups."
        )


def target_for_ratio(parent: Shape, ratio: float, method: str, of: str = "body") -> Shape:
    """Return the Shape that removes about ``ratio`` of a model.

    For depth, choose the number of layers whose count is nearest. For width, hidden and FFN channels shrink in
    proportion and KV groups are kept, as in Minitron (2407.14679): first choose ``hidden`` with ``ffn`` in the
    parent's proportion, then choose ``ffn`` for this ``hidden``, each time the multiple whose count is nearest. Sizes
    are multiples of the largest power of two up to 128 that divides the parent's sizes. The published widths for the
    same ratio were chosen by hand and have other proportions; see the presets.

    Args:
        parent: The model that is to be pruned; uneven layers count as their mean.
        ratio: Share to remove, between 0 and 1.
        method: minitron-depth, shortgpt or minitron-width.
        of: What the ratio is a share of, ``body`` or ``total``.

    Raises:
        UserError: the ratio leaves nothing or removes nothing, the method takes no ratio, or no shape is within 0.05.
    """
    if of not in DENOMINATORS:
        raise UserError(f"A ratio is a share of {' or '.join(DENOMINATORS)}, not of {of!r}.")
    if method not in _RATIO_AXES:
        raise UserError(f"The method {method} takes no ratio here; {', '.join(_RATIO_AXES)} do, or give --target.")
    if not 0 < ratio < 1:
        raise UserError(f"The ratio {ratio:g} leaves nothing or removes nothing; choose one between 0 and 1.")
    wanted = (1 - ratio) * _count(parent, of)
    if _RATIO_AXES[method] == "depth":
        lost = {layers: parameters_of_layers(parent, parent.layers - layers) for layers in range(1, parent.layers)}
        left = {layers: _count(parent, of) - count for layers, count in lost.items()}
        layers = min(left, key=lambda layers: (abs(left[layers] - wanted), layers), default=parent.layers)
        shape, count = parent.replace(layers=layers), left.get(layers, wanted)
    else:
        shape = _narrower(parent, wanted, of)
        count = _count(shape, of)
    if shape == parent or abs(count - wanted) > _TOLERANCE * _count(parent, of):
        raise UserError(
            f"No {_RATIO_AXES[method]} of this model is close to a ratio of {ratio:g} of {of}; "
            f"the nearest is [{shape}]. Choose another ratio, or give the sizes with --target."
        )
    return shape


def parameters_left(parent: Shape, ratio: float, of: str) -> int:
    """Return the parameters, embeddings included, left after removing a ratio of ``body`` or ``total`` from the body.

    Raises:
        UserError: the ratio leaves nothing or removes nothing, or ``of`` is neither.
    """
    if of not in DENOMINATORS:
        raise UserError(f"A ratio is a share of {' or '.join(DENOMINATORS)}, not of {of!r}.")
    if not 0 < ratio < 1:
        raise UserError(f"The ratio {ratio:g} leaves nothing or removes nothing; choose one between 0 and 1.")
    return parent.parameters - round(ratio * _count(parent, of))


def describe_removal(parent: Shape, target: Shape) -> str:
    """Describe how much is removed, with both denominators: ``43.5% of all parameters, 50.0% of the body``."""
    total, body = (1 - _count(target, of) / _count(parent, of) for of in ("total", "body"))
    return f"removes {total:.1%} of all parameters, {body:.1%} of the body (decoder layers and final norm)"


def write_target(shape: Shape, path: Path, spent: Mapping[str, int] | None = None) -> None:
    """Write the sizes as a JSON file for ``--target``; ``spent`` is the cost of searching for them (tokens, FLOPs)."""
    sizes = {name: getattr(shape, name) for name in SIZES}
    write_json(path, {**sizes, _SEARCH: dict(spent)} if spent else sizes)


class FoundSizes(NamedTuple):
    """Sizes in a file that ``write_target`` wrote."""

    sizes: dict[str, int]
    spent: Mapping[str, int] | None
    """Tokens and FLOPs of the search that found them, if there was one."""


def read_sizes(path: Path) -> FoundSizes:
    """Read a file that ``write_target`` wrote.

    Raises:
        UserError: the file is not a valid target.
    """
    sizes = read_json(path)
    if not isinstance(sizes, dict) or not sizes:
        raise UserError(f"{path} is not a target; it should hold sizes such as {{'hidden': 384, 'ffn': 1024}}.")
    spent = sizes.pop(_SEARCH, None)
    for name, size in sizes.items():
        _check_name(name, str(path))
        if type(size) is not int:
            raise UserError(f"{path} needs a whole number for {name}, not {size!r}.")
    return FoundSizes(sizes, spent)


def _check_name(name: str, where: str) -> None:
    if name not in TARGET_SIZES:
        near = difflib.get_close_matches(name, TARGET_SIZES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(TARGET_SIZES)}."
        raise UserError(f"{where} names an unknown size {name!r}; {hint}")


def _narrower(parent: Shape, wanted: float, of: str) -> Shape:
    multiple = math.gcd(parent.hidden, parent.ffn, 128)

    def proportional(hidden: int) -> Shape:
        steps = round(hidden * parent.ffn / parent.hidden / multiple)
        return parent.replace(hidden=hidden, ffn=max(1, steps) * multiple)

    widths = range(multiple, parent.hidden + 1, multiple)
    hidden = _nearest((proportional(hidden) for hidden in widths), wanted, of, parent).hidden
    heights = range(multiple, parent.ffn + 1, multiple)
    return _nearest((parent.replace(hidden=hidden, ffn=ffn) for ffn in heights), wanted, of, parent)


def _nearest(shapes: Iterable[Shape], wanted: float, of: str, default: Shape) -> Shape:
    """Return the Shape whose parameter count is nearest to ``wanted``; ties go to the smallest."""
    return min(shapes, key=lambda shape: (abs(_count(shape, of) - wanted), _count(shape, of)), default=default)


def _count(shape: Shape, of: str) -> int:
    return shape.body_parameters if of == "body" else shape.parameters


def parameters_of_layers(parent: Shape, layers: int) -> float:
    """Return the parameters of a number of layers; uneven ones count as their mean."""
    return layers * (parent.matrix_parameters + parent.vector_parameters) / parent.layers


def average_of_layers(parent: Shape, layers: int) -> Shape:
    """Return an even shape of ``layers`` layers with as many parameters as that many of a parent's uneven ones."""
    left = parent.parameters - parameters_of_layers(parent, parent.layers - layers)
    return shrunk(parent.replace(layers=layers), round(left))


def shrunk(parent: Shape, parameters: int) -> Shape:
    """Return the even shape of about ``parameters`` parameters with KV groups and FFN channels shrunk in proportion.

    Raises:
        UserError: the layers would be empty.
    """
    share = 1 - (parent.parameters - parameters) / parent.matrix_parameters
    groups = max(1, round(parent.kv_groups * share))
    fewer = parent.replace(kv_groups=groups)
    ffn = parent.ffn - round((fewer.parameters - parameters) / (3 * parent.hidden * parent.layers))
    if share <= 0 or ffn < 1:
        raise UserError(
            f"{parameters:,} parameters leave nothing for the layers in addition to the embeddings; choose a lower "
            "ratio."
        )
    return fewer.replace(ffn=min(ffn, parent.ffn))
