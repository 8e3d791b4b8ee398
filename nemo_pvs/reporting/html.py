"""The report of a finished run: one self-contained page, the same in short as Markdown, and the data behind both."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nemo_pvs.files import write_text
from nemo_pvs.reporting.figure import loss_figure, standalone
from nemo_pvs.reporting.ledger import Ledger
from nemo_pvs.reporting.numbers import DASH, duration, fixed, scientific
from nemo_pvs.reporting.results import ArmResult, Results
from nemo_pvs.reporting.table import NOTES, markdown_table, outcome, results_rows, total_cost

_REPEAT = "pvs run recipe.yaml --out again"  # every run folder holds its recipe


@dataclass(frozen=True)
class _LedgerRow:
    activity: str
    tokens: str
    flops: str
    note: str


def write_report(results: Results, folder: Path) -> None:
    """Write ``results.json``, ``report.md``, ``report.html`` and ``loss.svg`` into ``folder``, replacing older ones.

    The page needs neither network nor scripts, follows the reader's light or dark scheme, and prints on A4.

    Raises:
        UserError: the folder cannot be written.
    """
    results.save(folder / "results.json")
    write_text(folder / "report.md", markdown_report(results))
    write_text(folder / "report.html", html_report(results))
    write_text(folder / "loss.svg", standalone(loss_figure(results)))


def html_report(results: Results) -> str:
    """Return the page as text."""
    table = results_rows(results)
    template = resources.files("nemo_pvs.reporting").joinpath("template.html").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        results=results,
        outcome=outcome(results),
        total_cost=total_cost(results),
        # Safe: made by loss_figure, which escapes what it is given.
        figure=Markup(loss_figure(results)),
        table=table,
        heading_groups=[
            (group, list(columns)) for group, columns in groupby(table.columns, lambda column: column.group)
        ],
        notes=NOTES,
        runs=[_run_row(arm) for arm in results.arms],
        ledgers=[(arm.name, _ledger_rows(arm.ledger)) for arm in results.arms],
        recipe=_recipe_text(results),
        command=_REPEAT,
    )


def markdown_report(results: Results) -> str:
    """Return the headline, the results table and how to repeat the run, in GitHub's Markdown."""
    notes = "\n".join(f"- {note}" for note in NOTES)
    return "\n".join(
        [
            f"# {results.title}\n",
            f"**{outcome(results)}**\n",
            f"{total_cost(results)}\n",
            markdown_table(results),
            f"{notes}\n",
            f"Made {results.created} from the recipe below; figure, ledger and environment are in report.html.\n",
            f"Repeat it, in the folder of this file: `{_REPEAT}`\n",
            f"```yaml\n{_recipe_text(results)}```\n",
        ]
    )


def _run_row(arm: ArmResult) -> list[str]:
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
    ]


def _ledger_rows(ledger: Ledger) -> list[_LedgerRow]:
    """Return the charges and their sums; an empty ledger has no sums, because nothing is known."""
    rows = [
        _LedgerRow(charge.activity, fixed(charge.tokens, 0), scientific(charge.flops), charge.note)
        for charge in ledger.charges
    ]
    if rows:
        tokens, flops = ledger.total
        rows.append(_LedgerRow("total", fixed(tokens, 0), scientific(flops), "without evaluation"))
    return rows


def _recipe_text(results: Results) -> str:
    text: str = yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True)
    return text
