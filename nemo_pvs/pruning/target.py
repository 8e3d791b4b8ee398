"""The size that a user asks for: by sizes, ``hidden=384,ffn=1024``, by the share to remove, or by a published name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.presets import find_preset
from nemo_pvs.system.files import read_json, write_json

SIZES = ("layers", "hidden", "ffn", "kv_groups")
DENOMINATORS = ("body", "total")
"""What a ratio is a share of: decoder layers with the final norm, or all parameters."""

_SEARCH = "search"
_RATIO_AXES = {"minitron-depth": "depth", "shortgpt": "depth", "minitron-width": "width"}
_TOLERANCE = 0.05
"""How far the share that a target removes may be from the ratio."""


def choose_target(
    parent: Shape,
    method: str,
    *,
    target: str | None = None,
    ratio: float | None = None,
    of: str = "body",
    preset: str | None = None,
) -> Shape:
    """Return the Shape that ``--target``, ``--ratio`` or ``--preset`` asks for, exactly one of which must be given.

    Args:
        parent: The model that is to be pruned.
        method: Name of the pruning method.
        target: Sizes as ``parse_target`` takes them, or the path of a file that ``write_target`` wrote.
        ratio: Share to remove, between 0 and 1.
        of: What the ratio is a share of, ``body`` or ``total``.
        preset: Name of a published target.

    Raises:
        UserError: none or several are given, or the one given does not suit the model.
    """
    options = {"--target": target, "--ratio": ratio, "--preset": preset}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given) if given else 'Nothing'} says what to prune to; "
            "give one of --target hidden=384,ffn=1024, --ratio 0.5 and --preset 4b-depth."
        )
    if preset is not None:
        return find_preset(preset, parent).target
    if ratio is not None:
        return target_for_ratio(parent, ratio, method, of)
    assert target is not None
    return read_target(Path(target), parent) if target.endswith(".json") else parse_target(target, parent)


def parse_target(text: str, parent: Shape) -> Shape:
    """Return the parent's Shape with the sizes that ``text`` names; query heads follow the KV groups.

    Args:
        text: ``size=number`` pairs with commas between them.
        parent: The model that is to be pruned.

    Raises:
        UserError: a size is unknown, given twice, not a number, larger than the parent's, or would leave nothing.
    """
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        name, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals:
            raise UserError(f"The target {text!r} has {pair.strip()!r} where size=number is needed, e.g. hidden=384.")
        if name not in SIZES:
            near = difflib.get_close_matches(name, SIZES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(SIZES)}."
            raise UserError(f"The target {text!r} names an unknown size {name!r}; {hint}")
        if name in sizes:
            raise UserError(f"The target {text!r} gives {name} twice; give it once.")
        if not value.isdecimal():
            raise UserError(f"The target {text!r} needs a whole number for {name}, not {value!r}.")
        sizes[name] = int(value)
        largest = getattr(parent, name)
        if sizes[name] < 1:
            raise UserError(f"The target {text!r} leaves nothing of {name}; choose from 1 to {largest}.")
        if sizes[name] > largest:
            raise UserError(
                f"The target {text!r} asks for {name}={value}, but the model has {largest}; pruning only removes."
            )
    return parent.replace(**sizes)


def target_for_ratio(parent: Shape, ratio: float, method: str, of: str = "body") -> Shape:
    """Return the Shape that removes about ``ratio`` of a model.

    By depth, the number of layers that comes nearest. By width, hidden and FFN channels shrink alike, and KV groups
    stay, as in Minitron (2407.14679): first ``hidden``, of those multiples with which ``ffn`` in the parent's
    proportion comes nearest; then ``ffn``, the multiple that comes nearest with this ``hidden``. Multiples are of the
    largest power of two up to 128 that the parent's own sizes are multiples of. The publications' widths of the
    same ratio were chosen by hand and differ in proportion: see the presets.

    Args:
        parent: The model that is to be pruned, its layers alike.
        ratio: Share to remove, between 0 and 1.
        method: minitron-depth, shortgpt or minitron-width.
        of: What the ratio is a share of, ``body`` or ``total``.

    Raises:
        UserError: the ratio leaves nothing or removes nothing, the method takes none, or none comes within 0.05.
    """
    if of not in DENOMINATORS:
        raise UserError(f"A ratio is a share of {' or '.join(DENOMINATORS)}, not of {of!r}.")
    if method not in _RATIO_AXES:
        raise UserError(f"The method {method} takes no ratio here; {', '.join(_RATIO_AXES)} do, or give --target.")
    if not 0 < ratio < 1:
        raise UserError(f"The ratio {ratio:g} leaves nothing or removes nothing; choose one between 0 and 1.")
    wanted = (1 - ratio) * _count(parent, of)
    if _RATIO_AXES[method] == "depth":
        shape = _nearest((parent.replace(layers=layers) for layers in range(1, parent.layers)), wanted, of, parent)
    else:
        shape = _narrower(parent, wanted, of)
    if shape == parent or abs(_count(shape, of) - wanted) > _TOLERANCE * _count(parent, of):
        raise UserError(
            f"No {_RATIO_AXES[method]} of this model comes near a ratio of {ratio:g} of {of}; "
            f"the nearest is [{shape}]. Choose another ratio, or give the sizes with --target."
        )
    return shape


def parameters_left(parent: Shape, ratio: float, of: str) -> int:
    """Return how many parameters, embeddings and all, stay when a ratio of ``body`` or ``total`` goes from the body.

    Raises:
        UserError: the ratio leaves nothing or removes nothing, or is a share of something else.
    """
    if of not in DENOMINATORS:
        raise UserError(f"A ratio is a share of {' or '.join(DENOMINATORS)}, not of {of!r}.")
    if not 0 < ratio < 1:
        raise UserError(f"The ratio {ratio:g} leaves nothing or removes nothing; choose one between 0 and 1.")
    return parent.parameters - round(ratio * _count(parent, of))


def describe_removal(parent: Shape, target: Shape) -> str:
    """Return how much goes, with both denominators: ``43.5 % of all parameters, 50.0 % of the body``."""
    total, body = (1 - _count(target, of) / _count(parent, of) for of in ("total", "body"))
    return f"removes {total:.1%} of all parameters, {body:.1%} of the body (decoder layers and final norm)"


def write_target(shape: Shape, path: Path, spent: Mapping[str, int] | None = None) -> None:
    """Write the sizes as a JSON file, which ``--target`` takes; ``spent``: tokens and FLOPs of the search for them."""
    sizes = {name: getattr(shape, name) for name in SIZES}
    write_json(path, {**sizes, _SEARCH: dict(spent)} if spent else sizes)


def read_target(path: Path, parent: Shape) -> Shape:
    """Return the Shape in a file of ``write_target``.

    Raises:
        UserError: it is no such file, or the model cannot be pruned to it.
    """
    sizes = _read(path)
    return parse_target(",".join(f"{name}={size}" for name, size in sizes.items() if name != _SEARCH), parent)


def search_spent(target: str | None) -> Mapping[str, int] | None:
    """Return the ``tokens`` and ``flops`` of the search that found a ``--target``, if it is a file that says so."""
    return _read(Path(target)).get(_SEARCH) if target and target.endswith(".json") else None


def _read(path: Path) -> dict[str, Any]:
    sizes = read_json(path)
    if not isinstance(sizes, dict) or not sizes:
        raise UserError(f"{path} is not a target; it should hold sizes such as {{'hidden': 384, 'ffn': 1024}}.")
    return sizes


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
    """Return the Shape whose count is nearest, the smallest of equals."""
    return min(shapes, key=lambda shape: (abs(_count(shape, of) - wanted), _count(shape, of)), default=default)


def _count(shape: Shape, of: str) -> int:
    return shape.body_parameters if of == "body" else shape.parameters
