"""Every pruning method by its name: ours, and those of other packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.method import Method
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
    wanda,
    wanda_sp,
)

ENTRY_POINTS = "nemo_pvs.methods"
"""The group of entry points by which another package adds a ``Method``."""

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
    magnitude,
    wanda,
    sparsegpt,
)


@cache
def methods() -> Mapping[str, Method]:
    """Return every method by name, ours first.

    Raises:
        UserError: another package has one that cannot be loaded, or that has the name of another.
    """
    found = {module.METHOD.name: module.METHOD for module in _OURS}
    for method, package in _of_other_packages():
        if method.name in found:
            raise UserError(
                f"{package} adds a method {method.name}, but there is one already; rename or uninstall it."
            )
        found[method.name] = method
    return found


def _of_other_packages() -> Iterator[tuple[Method, str]]:
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        package = f"The package {entry.dist.name}" if entry.dist else f"The entry point {entry.value}"
        try:
            method = entry.load()
        except Exception as error:  # whatever its code raises, our own methods have no part in it
            raise UserError(
                f"{package} adds a method {entry.name} that cannot be loaded ({type(error).__name__}: {error}); "
                "repair or uninstall it."
            ) from error
        if not isinstance(method, Method):
            raise UserError(
                f"{package} adds {entry.name}, which is no nemo_pvs.pruning.method.Method; repair or uninstall it."
            )
        yield method, package


def method_named(name: str) -> Method:
    """Return a method.

    Raises:
        UserError: there is none of this name.
    """
    known = methods()
    if name not in known:
        raise UserError(f"--method is {name!r}; choose {', '.join(known)}.")
    return known[name]


def at_once() -> list[str]:
    """Return the names of the methods that ``pvs prune`` does by itself."""
    return [name for name, method in methods().items() if not method.trains]
