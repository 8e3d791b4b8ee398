"""The verb about recipes: recipes."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from nemo_pvs.system.progress import console

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045


def recipes(
    recipe: Annotated[
        Optional[str],
        typer.Argument(help="a recipe (name or path), to show its runs; or a folder of recipes, such as llama31_8b"),
    ] = None,
) -> None:
    """List the recipes that come with the package, or the runs of one and what NeMo calls them."""
    from rich.table import Table

    from nemo_pvs.cli.factory_names import factory_call
    from nemo_pvs.cluster.profile import packaged_profiles
    from nemo_pvs.planning.dry_run import settled
    from nemo_pvs.recipe.load import load_recipe, packaged_recipes
    from nemo_pvs.recipe.series import is_one_run

    if recipe is None:
        _list(packaged_recipes())
        console.print(f"launch profiles: {', '.join(packaged_profiles())} (under nemo: run.executor=pvs_PROFILE)")
        return
    if inside := [name for name in packaged_recipes() if name.startswith(f"{recipe.rstrip('/')}/")]:
        console.print(f"GPU-hours in total: {_list(inside):,.0f}")
        return
    known = settled(load_recipe(recipe))
    packaged = recipe in packaged_recipes() and is_one_run(known)  # only these have factories
    table = Table("run", "tokens", *(["nemo llm pretrain --factory"] if packaged else []))
    for arm in known.runs:
        table.add_row(arm.name, f"{arm.tokens:,}", *([factory_call(recipe, known, arm)] if packaged else []))
    console.print(table)


def _list(names: list[str]) -> float:
    """Show packaged recipes, with the hours on H100s of those for GPUs, and return the sum of these hours."""
    from rich.table import Table

    from nemo_pvs.cli.dry_run_table import on_gpus, plan_hours, teacher_hours
    from nemo_pvs.planning.dry_run import dry_run, settled
    from nemo_pvs.recipe.load import load_recipe

    table, total = Table("recipe", "runs", "GPU-hours", "what it does"), 0.0
    for name in names:
        known = settled(load_recipe(name))
        times = f" x {len(known.seeds)} seeds" if known.seeds else ""
        hours = None
        if on_gpus(known.train):
            plan = dry_run(known)
            hours = (plan_hours(plan) + teacher_hours(plan)) * len(known.seeds or [known.train.seed])
        total += hours or 0
        shown = "" if hours is None else f"{hours:,.0f}"
        table.add_row(name, f"{len(known.runs)}{times}", shown, known.title)
    console.print(table)
    return total
