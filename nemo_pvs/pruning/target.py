"""The size that a user asks for: ``hidden=384,ffn=1024,kv_groups=2`` or ``layers=14``."""

from __future__ import annotations

import difflib

from nemo_pvs.errors import UserError
from nemo_pvs.shape import Shape

SIZES = ("layers", "hidden", "ffn", "kv_groups")


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
