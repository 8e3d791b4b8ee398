"""Everything that was measured into one folder, as one JSON file and as a table with a column a model."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json

Measured = dict[str, dict[str, Any]]
"""``arc_challenge/25-shot/acc_norm``: value, stderr and what they rest on."""


def average(measured: Measured, names: list[str]) -> dict[str, Any] | None:
    """Return the mean of several metrics with its standard error, the tasks independent; None if one is missing."""
    if not names or any(name not in measured for name in names):
        return None
    errors = [measured[name]["stderr"] for name in names]
    return {
        "value": sum(measured[name]["value"] for name in names) / len(names),
        "stderr": None if None in errors else math.hypot(*errors) / len(names),
        "higher_is_better": True,
        "documents": sum(measured[name]["documents"] for name in names),
    }


def measured_before(file: Path) -> list[dict[str, Any]]:
    """Return what ``results.json`` says of models; nothing if it is not there.

    Raises:
        UserError: the file is of something else, such as a run, and would be lost.
    """
    if not file.is_file():
        return []
    known = read_json(file)
    if not isinstance(known, dict) or not isinstance(known.get("models"), list):
        raise UserError(
            f"{file} is no evaluation's and would be overwritten; choose a folder of its own with --out, such as "
            f"{file.parent / 'evaluation'}."
        )
    models: list[dict[str, Any]] = known["models"]
    return models


def with_earlier(models: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return models with what was measured of them before, and then the other models that were.

    A model is the same by its weights, the backend that ran it and the limit of documents; of the same metric the new
    measurement counts.
    """
    known = {_identity(model): model for model in earlier}
    joined = [
        {**model, "measured": {**known.get(_identity(model), {}).get("measured", {}), **model["measured"]}}
        for model in models
    ]
    new = {_identity(model) for model in models}
    return joined + [model for model in earlier if _identity(model) not in new]


def _identity(model: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(model.get(name) for name in ("fingerprint", "backend", "limit"))


def summary(models: list[dict[str, Any]], compute: dict[str, Any]) -> dict[str, Any]:
    """Return what ``results.json`` holds; the metrics of single documents stay in the files of ``measured/``."""
    packages = ("nemo_pvs", "lm_eval", "torch", "transformers")
    return {
        "models": [
            {
                **model,
                "measured": {
                    name: {key: value for key, value in about.items() if key != "by_document"}
                    for name, about in model["measured"].items()
                },
            }
            for model in models
        ],
        "compute": compute,
        "environment": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def summary_table(models: list[dict[str, Any]]) -> Table:
    """Return a row a metric and a column a model: value, plus or minus one standard error."""
    table = Table("", "on", *(model["checkpoint"] for model in models))
    for column in table.columns:
        column.overflow = "fold"  # a path is cut over lines,
    for column, model in zip(table.columns[2:], models, strict=True):
        column.min_width = max(len(_cell(*one)) for one in model["measured"].items())  # a number is not
    table.add_row("parameters (M)", "", *(f"{model['parameters'] / 1e6:,.1f}" for model in models), end_section=True)
    for name in dict.fromkeys(name for model in models for name in model["measured"]):
        cells = [model["measured"].get(name) for model in models]
        first = next(cell for cell in cells if cell)
        table.add_row(name, _on(first), *("" if cell is None else _cell(name, cell) for cell in cells))
    return table


def _on(about: dict[str, Any]) -> str:
    """Return how much was measured, and for texts how it was cut."""
    if "windows" in about:
        return f"{about['tokens']:,} tokens, {about['windows']}"
    return f"{about['documents']:,} questions"


def _cell(name: str, about: dict[str, Any]) -> str:
    """Return a share as a percentage, anything else as it is."""
    share = name.rpartition("/")[2].partition(",")[0] in ("acc", "acc_norm", "average")
    scale, digits = (100, 2) if share else (1, 4 if name.endswith("loss") else 3)
    shown = [about["value"]] if about["stderr"] is None else [about["value"], about["stderr"]]
    return " ± ".join(f"{scale * one:,.{digits}f}" if one < 1e6 else f"{one:.3g}" for one in shown)
