"""Every pruning method by its name: those of nemo_pvs, and those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods import (
    adapt_pruner,
    efficient_llm,
    flap,
    llm_pruner,
    magnitude,
    magnitude_sp,
    minitron_depth,
    minitron_joint,
    minitron_width,
    sheared_llama,
    shortgpt,
    sparsegpt,
    vocabulary,
    wanda,
    wanda_sp,
)
from nemo_pvs.system.progress import say_once

ENTRY_POINTS = "nemo_pvs.methods"
"""The group of entry points by which another package adds a ``PruningMethod``."""

_OURS = (
    minitron_depth,
    shortgpt,
    minitron_width,
    minitron_joint,
    flap,
    wanda_sp,
    magnitude_sp,
    llm_pruner,
    sheared_llama,
    efficient_llm,
    adapt_pruner,
    vocabulary,
    magnitude,
    wanda,
    sparsegpt,
)


@cache
def methods() -> Mapping[str, PruningMethod]:
    """Return every method by name, built-in ones first; unusable ones of other packages are skipped with a message."""
    found = {module.METHOD.name: module.METHOD for module in _OURS}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            method = entry.load()
        except Exception as error:  # whatever its code raises, it must not stop users of other methods
            _leave_out(entry, f"it cannot be loaded ({type(error).__name__}: {error})")
            continue
        if not isinstance(method, PruningMethod):
            _leave_out(entry, "it is not a nemo_pvs.pruning.method.PruningMethod")
        elif method.name in found:
            _leave_out(entry, f"there already is a method {method.name}")
        else:
            found[method.name] = method
    return found


def _leave_out(entry: metadata.EntryPoint, why: str) -> None:
    package = entry.dist.name if entry.dist else entry.value
    say_once(f"The method {entry.name} of the package {package} is left out: {why}; repair or uninstall the package.")


def method_named(name: str) -> PruningMethod:
    """Return the method with this name.

    Raises:
        UserError: there is no such method.
    """
    known = methods()
    if name not in known:
        raise UserError(f"--method is {name!r}; choose {', '.join(known)}.")
    return known[name]


def at_once() -> list[str]:
    """Return the names of the methods that ``pvs prune`` can run, without training."""
    return [name for name, method in methods().items() if not method.trains]
