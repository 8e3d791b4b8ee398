"""The verb about recipes: recipes."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from nemo_pvs.system.progress import console

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045


def recipes(
    recipe: Annotated[Optional[str], typer.Argument(help="show the runs of this one: a name, or a path")] = None,
) -> None:
    """List the recipes that come with the package, or the runs of one and what NeMo calls them."""
    from rich.table import Table

    from nemo_pvs.cli.factory_names import factory_call
    from nemo_pvs.cluster.profile import packaged_profiles
    from nemo_pvs.planning.dry_run import settled
    from nemo_pvs.recipe.load import load_recipe, packaged_recipes
    from nemo_pvs.recipe.series import is_one_run

    if recipe is None:
        table = Table("recipe", "runs", "what it does")
        for name in packaged_recipes():
            known = settled(load_recipe(name))
            times = f" x {len(known.seeds)} seeds" if known.seeds else ""
            table.add_row(name, f"{len(known.runs)}{times}", known.title)
        console.print(table)
        console.print(f"launch profiles: {', '.join(packaged_profiles())} (under nemo: run.executor=pvs_PROFILE)")
        return
    known = settled(load_recipe(recipe))
    packaged = recipe in packaged_recipes() and is_one_run(known)  # only these have factories
    table = Table("run", "tokens", *(["nemo llm pretrain --factory"] if packaged else []))
    for arm in known.runs:
        table.add_row(arm.name, f"{arm.tokens:,}", *([factory_call(recipe, known, arm)] if packaged else []))
    console.print(table)
