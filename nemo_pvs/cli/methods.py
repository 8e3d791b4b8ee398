"""The verb that describes the pruning methods: methods."""

from __future__ import annotations

from nemo_pvs.system.progress import console


def methods() -> None:
    """List the pruning methods: what each removes, the options it takes, and its paper."""
    from rich.table import Table

    from nemo_pvs.pruning.registry import methods as known

    table = Table("method", "removes", "options of pvs prune", "arXiv")
    for method in known().values():
        options = "in a recipe only" if method.trains else ", ".join(method.options.names("--{}"))
        table.add_row(method.name, method.removes, options, method.paper)
    console.print(table)
