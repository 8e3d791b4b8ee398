"""The report of finished runs: a self-contained page, a short version in Markdown, and their data."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.reporting.compare.budgets import budget_rows
from nemo_pvs.reporting.compare.compare import RESULTS, compare, read_runs
from nemo_pvs.reporting.compare.regained import regained
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.compare.tasks import averages, task_rows
from nemo_pvs.reporting.data import csv_text, report_data
from nemo_pvs.reporting.figures.accuracy import accuracy_figure
from nemo_pvs.reporting.figures.gap import gap_against_ratio, gap_against_tokens
from nemo_pvs.reporting.figures.loss import loss_figure, loss_panels, standalone
from nemo_pvs.reporting.figures.regained import regained_panels
from nemo_pvs.reporting.figures.terms import terms_figure
from nemo_pvs.reporting.numbers import DASH, duration, fixed, scientific
from nemo_pvs.reporting.results import ArmResult, Results
from nemo_pvs.reporting.tables.budgets import BUDGET_HEADINGS, budget_cells, budget_notes
from nemo_pvs.reporting.tables.conclusions import (
    FINDINGS_NOTE,
    FINDINGS_TITLE,
    RECOVERY_HEADINGS,
    RECOVERY_NOTE,
    RECOVERY_TITLE,
    finding_line,
    recovery_cells,
)
from nemo_pvs.reporting.tables.regained import REGAINED_NOTES, REGAINED_TITLE, regained_cells, regained_headings
from nemo_pvs.reporting.tables.results import (
    markdown_rows,
    markdown_table,
    notes_of,
    outcome,
    results_rows,
    total_cost,
)
from nemo_pvs.reporting.tables.sweeps import SWEEP_HEADINGS, SWEEP_TITLE, sweep_cells, sweep_notes
from nemo_pvs.reporting.tables.tasks import TASK_HEADINGS, TERMS_HEADINGS, task_cells, task_notes, terms_cells
from nemo_pvs.reporting.tables.texts import TEXTS_NOTE, TEXTS_TITLE, text_cells, text_headings
from nemo_pvs.system.files import write_json, write_text

_REPEAT = "pvs run recipe.yaml --out again"  # every run folder contains its recipe


@dataclass(frozen=True)
class _LedgerRow:
    activity: str
    tokens: str
    flops: str
    zeros_skipped: str
    note: str


def write_report(results: Results, folder: Path) -> None:
    """Write a finished run's ``results.json`` and its report into ``folder``, replacing older ones.

    Raises:
        UserError: the folder cannot be written, or its ``evaluation`` holds no evaluation.
    """
    results.save(folder / RESULTS)
    write_files(compare(read_runs([str(folder)])), folder)


def write_files(runs: SideBySide, folder: Path, *, reference: bool = False) -> None:
    """Write ``report.html``, its content as ``report.md``, ``report.json`` and ``report.csv``, and ``loss.svg``.

    If pruned and scratch were compared, write ``equal_terms.csv`` too, and ``tasks.csv`` if tasks were measured. The
    page needs neither network nor scripts, follows the reader's light or dark colour scheme, and prints on A4.

    Args:
        runs: The runs to report.
        folder: Output folder; created if necessary.
        reference: Also show the paper's points.

    Raises:
        UserError: the folder cannot be written.
    """
    data = report_data(runs, reference=reference)
    write_text(folder / "report.md", markdown_report(runs, reference=reference))
    write_text(folder / "report.html", html_report(runs, reference=reference))
    write_json(folder / "report.json", data)
    write_text(folder / "report.csv", csv_text(data["arms"]))
    for name, rows in (("equal_terms.csv", data["equal_terms"]), ("tasks.csv", data["averages"] + data["tasks"])):
        if rows:
            write_text(folder / name, csv_text(rows))
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier report of other runs
    write_text(folder / "loss.svg", standalone(loss_figure(runs.results, deviations_of(runs), runs.missing)))


def deviations_of(runs: SideBySide) -> dict[str, dict[int, float]]:
    """Return the standard deviations of all validation losses, for the figure."""
    return {arm.name: runs.loss_deviations(arm) for arm in runs.results.arms}


def html_report(runs: SideBySide, *, reference: bool = False) -> str:
    """Return the page as text; ``reference`` also shows the paper's points in the figures of gaps."""
    results, tasks = runs.results, task_rows(runs)
    table = results_rows(results, runs)
    budgets = budget_rows(runs, reference=reference)
    returning = regained(runs)
    template = resources.files("nemo_pvs.reporting").joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    # Safe: our figures escape their inputs.
    on_gpus = any(arm.peak_gigabytes is not None for arm in results.arms)

    def drawn(*figures: str) -> list[Markup]:
        return [Markup(figure) for figure in figures if figure]

    return environment.from_string(template).render(
        results=results,
        runs=runs,
        outcome=outcome(results, runs),
        total_cost=total_cost(results),
        findings_title=FINDINGS_TITLE,
        findings_note=FINDINGS_NOTE,
        recoveries=recovery_cells(runs.recoveries),
        recovery_title=RECOVERY_TITLE,
        recovery_headings=RECOVERY_HEADINGS,
        recovery_note=RECOVERY_NOTE,
        panels=drawn(*loss_panels(results, deviations_of(runs), runs.missing)),
        gaps=drawn(gap_against_ratio(runs, reference=reference), *gap_against_tokens(runs, reference=reference)),
        equal_terms=drawn(terms_figure(runs)),
        budgets=budget_cells(budgets),
        budget_headings=BUDGET_HEADINGS,
        budget_notes=budget_notes(runs, budgets),
        reference=reference,
        accuracy=drawn(accuracy_figure(averages(tasks))),
        tasks=task_cells(averages(tasks) + tasks),
        task_headings=TASK_HEADINGS,
        task_notes=task_notes(runs),
        regained=drawn(*regained_panels(returning)),
        regained_title=REGAINED_TITLE,
        regained_cells=regained_cells(returning),
        regained_headings=regained_headings(returning),
        regained_notes=REGAINED_NOTES,
        texts=text_cells(results),
        text_headings=text_headings(results),
        texts_title=TEXTS_TITLE,
        texts_note=TEXTS_NOTE,
        sweeps=sweep_cells(runs),
        sweep_headings=SWEEP_HEADINGS,
        sweep_title=SWEEP_TITLE,
        sweep_notes=sweep_notes(runs),
        terms=terms_cells(runs),
        terms_headings=TERMS_HEADINGS,
        table=table,
        heading_groups=[
            (group, list(columns)) for group, columns in groupby(table.columns, lambda column: column.group)
        ],
        notes=notes_of(runs),
        arms=[_run_row(arm, on_gpus=on_gpus) for arm in results.arms],
        on_gpus=on_gpus,
        masked=_any_masked(results),
        ledgers=[(arm.name, _ledger_rows(arm.ledger)) for arm in results.arms],
        settings=[(run, _recipe_text(run.results)) for run in runs.runs],
        command=_command(runs, reference),
    )


def markdown_report(runs: SideBySide, *, reference: bool = False) -> str:
    """Return the headline, the findings, the tables and the command that repeats the runs, in GitHub's Markdown."""
    results, tasks = runs.results, task_rows(runs)
    parts = [
        f"# {results.title}\n",
        *(f"> **{warning}**\n" for warning in runs.warnings),
        f"**{outcome(results, runs)}**\n",
        f"{total_cost(results)}\n",
        *_markdown_conclusions(runs),
        markdown_table(results, runs),
        "\n".join(f"- {note}" for note in notes_of(runs)) + "\n",
    ]
    if terms := terms_cells(runs):
        parts += ["## On equal terms\n", markdown_rows(TERMS_HEADINGS, terms)]
    if budgets := budget_rows(runs, reference=reference):
        parts += ["## By method and budget\n", markdown_rows(BUDGET_HEADINGS, budget_cells(budgets))]
        parts.append("\n".join(f"- {note}" for note in budget_notes(runs, budgets)) + "\n")
    if tasks:
        parts += ["## Tasks\n", markdown_rows(TASK_HEADINGS, task_cells(averages(tasks) + tasks))]
        parts.append("\n".join(f"- {note}" for note in task_notes(runs)) + "\n")
    if returning := regained(runs):
        rows = markdown_rows(regained_headings(returning), regained_cells(returning))
        parts += [f"## {REGAINED_TITLE}\n", rows, "\n".join(f"- {note}" for note in REGAINED_NOTES) + "\n"]
    if texts := text_cells(results):
        parts += [f"## {TEXTS_TITLE}\n", markdown_rows(text_headings(results), texts), f"{TEXTS_NOTE}\n"]
    if sweeps := sweep_cells(runs):
        parts += [f"## {SWEEP_TITLE}\n", markdown_rows(SWEEP_HEADINGS, sweeps)]
        parts.append("\n".join(f"- {note}" for note in sweep_notes(runs)) + "\n")
    recipe = "recipe" if len(runs.runs) == 1 else "recipes"
    parts += [
        f"Made {results.created} from the {recipe} below; figures, ledger and environment are in report.html.\n",
        f"Repeat it, in the folder of this file: `{_REPEAT}`\n"
        if len(runs.runs) == 1
        else f"Repeat it: `{_command(runs, reference)}`\n",
        *(f"```yaml\n{_recipe_text(run.results)}```\n" for run in runs.runs),
    ]
    return "\n".join(parts)


def _markdown_conclusions(runs: SideBySide) -> list[str]:
    parts = []
    if runs.findings:
        parts += [f"## {FINDINGS_TITLE}\n", "\n".join(f"- {finding_line(item)}" for item in runs.findings) + "\n"]
        parts.append(f"{FINDINGS_NOTE}\n")
    if runs.recoveries:
        parts += [f"## {RECOVERY_TITLE}\n", markdown_rows(RECOVERY_HEADINGS, recovery_cells(runs.recoveries))]
        parts.append(f"{RECOVERY_NOTE}\n")
    return parts


def _command(runs: SideBySide, reference: bool) -> str:
    if len(runs.runs) == 1:
        return _REPEAT
    command = ["pvs", "report", *(run.label for run in runs.runs)]
    if runs.differences:
        command.append("--force")
    if reference:
        command.append("--published")
    return shlex.join(command)


def _any_masked(results: Results) -> bool:
    return any(charge.flops_zeros_skipped is not None for arm in results.arms for charge in arm.ledger.charges)


def _run_row(arm: ArmResult, *, on_gpus: bool) -> list[str]:
    """Return the formatted cells about how an arm was trained, with the use of its GPUs if any arm has it."""
    rates = [point.learning_rate for point in arm.training if point.learning_rate is not None]
    return [
        arm.name,
        arm.method,
        {"pruned": "pruned parent", "random": "random"}[arm.initialisation],
        *(str(arm.parallel.get(dimension, DASH)) for dimension in ("tensor", "pipeline", "data")),
        f"{arm.training[-1].step:,}" if arm.training else DASH,
        f"{max(rates):g}" if rates else DASH,
        fixed(arm.training[-1].loss if arm.training else None),
        duration(arm.seconds),
        fixed(arm.tokens_per_second, 0),
        *[fixed(arm.mfu, 3), fixed(arm.peak_gigabytes, 1)] * on_gpus,
    ]


def _ledger_rows(ledger: Ledger) -> list[_LedgerRow]:
    """Return the charges and their sums; an empty ledger has no sums, because the costs are unknown."""
    rows = []
    for charge in ledger.charges:
        skipped = charge.flops if charge.flops_zeros_skipped is None else charge.flops_zeros_skipped
        tokens, flops = fixed(charge.tokens, 0), scientific(charge.flops)
        rows.append(_LedgerRow(charge.activity, tokens, flops, scientific(skipped), charge.note))
    if rows:
        total, skipped = ledger.total, ledger.total_zeros_skipped.flops
        tokens, flops = fixed(total.tokens, 0), scientific(total.flops)
        rows.append(_LedgerRow("total", tokens, flops, scientific(skipped), "without evaluation"))
    return rows


def _recipe_text(results: Results) -> str:
    text: str = yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True)
    return text
