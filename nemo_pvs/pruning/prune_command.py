"""What a user asks of ``pvs prune``; read without PyTorch, so that a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.pruning.target import FoundSizes, parse_sizes, read_sizes


class PruneCommand(NamedTuple):
    """A method with its options, the sizes of the target among them."""

    method: PruningMethod
    options: Any
    """Of the class that the method names."""
    spent: Mapping[str, int] | None
    """Tokens and FLOPs of the search that found the target, if there was one."""


def read_prune_command(method: str, target: str | Path | None, options: Mapping[str, Any]) -> PruneCommand:
    """Read the name of a method, a target (sizes, or the file of ``pvs search``) and the method's other options.

    Raises:
        UserError: there is no such method, it has no such option, or a value is invalid.
    """
    chosen = method_named(method)
    found = _sizes(target)
    if chosen.trains:  # such a method answers with its own message, whatever the options
        return PruneCommand(chosen, chosen.options(), found.spent)
    return PruneCommand(chosen, chosen.options.parse(method, {**options, **found.sizes}, "--{}"), found.spent)


def _sizes(target: str | Path | None) -> FoundSizes:
    if target is None:
        return FoundSizes({}, None)
    text = str(target)
    return read_sizes(Path(text)) if text.endswith(".json") else FoundSizes(parse_sizes(text), None)
