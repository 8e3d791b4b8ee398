"""The verbs that lead to an answer: evaluate, run, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_pvs.progress import console, progress
from nemo_pvs.verbs.arguments import Samples, Seed, SequenceLength, Text, tokens_of

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045


def evaluate(
    paths: Annotated[list[str], typer.Argument(help="Hugging Face folders or NeMo checkpoints")],
    data: Text = "wikipedia-sample",
    samples: Samples = 64,
    sequence_length: SequenceLength = 512,
    seed: Seed = -1,
) -> None:
    """Measure perplexity of checkpoints on the same text."""
    from rich.table import Table

    from nemo_pvs.checkpoints.detect import open_source
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.evaluation.perplexity import perplexity

    models = {path: open_source(path) for path in paths}
    table = Table("model", "parameters (M)", "loss (nats/token)", "perplexity", "tokens")
    for path, model in models.items():
        tokens = tokens_of(path, data, samples, sequence_length, seed)
        with progress(f"evaluate {path}", "layers") as show:
            measured = perplexity(model, tokens, progress=show)
        table.add_row(
            path,
            f"{shape_of(model).parameters / 1e6:,.1f}",
            f"{measured['loss']:.4f}",
            f"{measured['perplexity']:,.2f}",
            f"{measured['tokens']:,}",
        )
    console.print(table)


def run(
    recipe: Annotated[str, typer.Argument(help="path of a recipe, or the name of one of ours: smollm2_135m/demo")],
    out: Annotated[Optional[str], typer.Option(help="run folder; runs/<recipe name> by default")] = None,
    force: Annotated[
        Optional[list[str]], typer.Option(help="do this stage again: calibrate, prune/width, train, ...")
    ] = None,
    prepare_only: Annotated[bool, typer.Option(help="stop before training, for ranks that Slurm starts")] = False,
) -> None:
    """Run a recipe: calibrate, prune, train every arm, evaluate, report."""
    from nemo_pvs.recipe import load_recipe

    checked = load_recipe(recipe)  # before the heavy imports: a typo is answered at once
    from nemo_pvs.pipeline import Pipeline
    from nemo_pvs.reporting.assemble import assemble
    from nemo_pvs.reporting.html import write_report

    folder = Path(out or f"runs/{checked.name}")
    pipeline = Pipeline(checked, folder, tuple(force or ()))
    if prepare_only:
        for job in pipeline.prepare_only():
            console.print(f"ready to train: {job}", soft_wrap=True)
        return
    pipeline.run()
    results = assemble(pipeline)
    write_report(results, folder)
    _show(results, folder)


def report(
    folder: Annotated[str, typer.Argument(help="run folder with results.json")],
) -> None:
    """Write a finished run's report again and show its table."""
    from nemo_pvs.reporting.html import write_report
    from nemo_pvs.reporting.results import Results

    results = Results.load(Path(folder) / "results.json")
    write_report(results, Path(folder))
    _show(results, Path(folder))


def _show(results: Any, folder: Path) -> None:
    from nemo_pvs.reporting.table import results_table

    console.print()
    console.print(results_table(results))
    console.print(f"\nReport: {(folder / 'report.html').resolve()}", soft_wrap=True)
