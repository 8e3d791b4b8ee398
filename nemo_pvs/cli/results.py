"""The verbs that lead to an answer: run, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_pvs.cli.arguments import IgnoreManifest
from nemo_pvs.errors import UserError
from nemo_pvs.system.output_paths import check_folder
from nemo_pvs.system.progress import console

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045


def run(
    recipe: Annotated[str, typer.Argument(help="path of a recipe, or name of a packaged one: smollm2_135m/demo")],
    out: Annotated[Optional[str], typer.Option(help="run folder; runs/<recipe name> by default")] = None,
    force: Annotated[
        Optional[list[str]], typer.Option(help="do this stage again: calibrate, prune/width, train, ...; repeatable")
    ] = None,
    jobs: Annotated[
        Optional[int],
        typer.Option(help="arms to train at the same time, one thread per rank or a share of the GPUs each"),
    ] = None,
    so_far: Annotated[
        bool, typer.Option(help="train nothing; report the arms that are finished, and list the others as missing")
    ] = False,
    prepare_only: Annotated[bool, typer.Option(help="stop before training, for ranks that Slurm starts")] = False,
    dry_run: Annotated[bool, typer.Option(help="print what would be done, and do nothing")] = False,
    mfu: Annotated[
        Optional[float], typer.Option(help="with --dry-run: share of a GPU's peak FLOPs to expect, for GPU-hours")
    ] = None,
    launch: Annotated[
        Optional[str], typer.Option(help="profile of where to run: local_cpu, local_gpu, slurm_h100, or a path")
    ] = None,
    ignore_manifest: IgnoreManifest = False,
) -> None:
    """Run a recipe: calibrate, prune, train every arm, evaluate, report."""
    from nemo_pvs.api.run import check_jobs, prepare
    from nemo_pvs.api.run import run as run_recipe
    from nemo_pvs.recipe.load import load_recipe
    from nemo_pvs.recipe.series import phases

    check_jobs(jobs)
    if so_far and (force or launch is not None or prepare_only):
        raise UserError("--so-far trains nothing; do not combine it with --force, --launch or --prepare-only.")
    if launch is not None and (prepare_only or force or ignore_manifest):
        raise UserError(
            "--launch submits every stage as it is; leave out --prepare-only, --force and --ignore-manifest."
        )
    if jobs is not None and (launch is not None or prepare_only):
        raise UserError("--jobs is for trainings of this command; leave it out with --launch or --prepare-only.")
    if mfu is not None and not dry_run:
        raise UserError("--mfu is for the GPU-hours of --dry-run; add --dry-run, or leave it out.")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu is a share of the peak FLOPs, above 0 and at most 1, not {mfu:g}.")
    checked = load_recipe(recipe)  # before the heavy imports: a typo is answered at once
    folder = Path(out or f"runs/{checked.name}")
    if not dry_run:
        check_folder(folder)
    if launch is not None:
        _launch(checked, recipe, folder, launch, dry_run=dry_run, mfu=mfu)
        return
    if dry_run:
        from nemo_pvs.cli.dry_run_table import executor_here, show_series

        show_series(checked, folder, executor_here(), mfu)
        return
    if prepare_only:
        for job in prepare(checked, folder, force=force or (), ignore_manifest=ignore_manifest):
            console.print(f"ready to train: {job}", soft_wrap=True)
        return
    results = run_recipe(checked, folder, force=force or (), jobs=jobs, so_far=so_far, ignore_manifest=ignore_manifest)
    if not checked.parent.has_weights:  # what was trained is the parent of other recipes
        for member in phases(checked, folder)[-1]:
            for arm in checked.runs:
                model = member.folder / "models" / arm.name
                if model.exists():
                    console.print(f"trained: {model}", soft_wrap=True)
    from nemo_pvs.pipeline.series import compare_seeds

    _show(results, folder, compare_seeds(phases(checked, folder)[-1]) if checked.seeds else None)


def _launch(checked: Any, recipe: str, folder: Path, profile_name: str, *, dry_run: bool, mfu: float | None) -> None:
    from nemo_pvs.cli.dry_run_table import show_series
    from nemo_pvs.cluster.experiment import check_submission, launch, scripts, stages
    from nemo_pvs.cluster.profile import load_profile

    profile = load_profile(profile_name)
    todo = stages(checked, recipe, folder, profile)
    if dry_run:
        show_series(checked, folder, profile_name, mfu, profile if profile.kind == "slurm" else None)
        for name, script in scripts(todo, checked.name, folder, profile).items():
            console.rule(name)
            console.print(script, soft_wrap=True)
        return
    if profile.kind == "slurm":
        check_submission(checked, folder, profile)
    launch(todo, checked.name, folder, profile)


def report(
    folders: Annotated[list[str], typer.Argument(help="run folders with results.json; several are compared")],
    out: Annotated[
        Optional[str], typer.Option(help="folder to write to; the run's own, or runs/report for several")
    ] = None,
    evaluation: Annotated[
        Optional[list[str]],
        typer.Option(help="--out folder of pvs evaluate, for the tasks of these runs' models; repeatable"),
    ] = None,
    curve: Annotated[
        Optional[list[str]],
        typer.Option(help="ARM=LOG: its validation losses are in TensorBoard's folder, or in a CSV export of W&B"),
    ] = None,
    published: Annotated[bool, typer.Option(help="show the paper's points next to the gaps")] = False,
    non_inferior_to: Annotated[
        Optional[str], typer.Option(help="parent: test whether each pruned model is as good, to within --margin")
    ] = None,
    margin: Annotated[Optional[float], typer.Option(help="largest acceptable shortfall against the parent")] = None,
    unit: Annotated[
        str, typer.Option(help="of the margin: points (of accuracy and other shares) or nats (of loss and KL)")
    ] = "points",
    force: Annotated[bool, typer.Option(help="compare runs that are not comparable, and say so on the page")] = False,
) -> None:
    """Write the report of finished runs, as page, Markdown, JSON and CSV, and show its table."""
    from nemo_pvs.api.report import report as write
    from nemo_pvs.api.report import report_folder

    runs = write(
        folders,
        out,
        evaluation=evaluation or (),
        curve=curve or (),
        published=published,
        non_inferior_to=non_inferior_to,
        margin=margin,
        unit=unit,
        force=force,
    )
    for warning in runs.warnings:
        console.print(warning, soft_wrap=True)
    _show(runs.results, report_folder(folders, out), runs)


def _show(results: Any, folder: Path, runs: Any = None) -> None:
    from nemo_pvs.reporting.tables.conclusions import conclusions_text
    from nemo_pvs.reporting.tables.results import results_table

    console.print()
    console.print(results_table(results, runs, width=console.width), crop=False)
    if runs is not None and (lines := conclusions_text(runs.findings, runs.recoveries)):
        console.print()
        for line in lines:
            console.print(line, soft_wrap=True)
    console.print(f"\nReport: {(folder / 'report.html').resolve()}", soft_wrap=True)
