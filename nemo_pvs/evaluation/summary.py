"""All measurements in one folder, as one JSON file and as a table with one column per model."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json

_SHARES = ("acc", "acc_norm", "average", "repetition", "distinct_1", "distinct_2", "agreement")
"""Metrics that are shown in per cent."""
_BORDER = 3
"""Columns of the terminal that a column of a table takes besides its cells."""
_LEAST_ROOM_FOR_NAMES = 30
"""Columns of the terminal for the names of the metrics and what they were measured on."""
_PRECISE = ("loss", "bits_per_byte", "kl")
"""Beginnings of metrics that are shown with four decimals."""

MeasuredMetrics = dict[str, dict[str, Any]]
"""By name (``arc_challenge/25-shot/acc_norm``): value, standard error and what was measured."""


def average(measured: MeasuredMetrics, names: list[str]) -> dict[str, Any] | None:
    """Return the mean of several metrics, with the standard error for independent tasks; None if one is missing."""
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
    """Return the models in ``results.json``; an empty list if the file does not exist.

    Raises:
        UserError: the file belongs to something else, such as a run, and would be overwritten.
    """
    if not file.is_file():
        return []
    known = read_json(file)
    if not isinstance(known, dict) or not isinstance(known.get("models"), list):
        raise UserError(
            f"{file} does not belong to an evaluation and would be overwritten; choose another folder with --out, "
            f"such as {file.parent / 'evaluation'}."
        )
    models: list[dict[str, Any]] = known["models"]
    return models


def with_earlier(models: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return models with their earlier measurements added, followed by all other earlier models.

    Two entries are the same model if fingerprint, tokenizer, backend and document limit are equal. If both have the
    same metric, the new measurement counts.
    """
    known = {_identity(model): model for model in earlier}
    joined = [
        {**model, "measured": {**known.get(_identity(model), {}).get("measured", {}), **model["measured"]}}
        for model in models
    ]
    new = {_identity(model) for model in models}
    return joined + [model for model in earlier if _identity(model) not in new]


def _identity(model: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(model.get(name) for name in ("fingerprint", "tokenizer_sha256", "backend", "limit"))


def summary(models: list[dict[str, Any]], compute: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``results.json``; metrics of single documents are only in the files of ``measured/``."""
    packages = ("nemo_pvs", "lm_eval", "torch", "transformers")
    return {
        "models": [
            {
                **model,
                "measured": {
                    name: {key: value for key, value in result.items() if key != "by_document"}
                    for name, result in model["measured"].items()
                },
            }
            for model in models
        ],
        "compute": compute,
        "environment": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def summary_tables(models: list[dict[str, Any]], width: int) -> list[Table]:
    """Return tables with one row per metric and one column per model: value ± standard error.

    Args:
        models: The models, as in ``results.json``.
        width: Columns of the terminal; models that do not fit next to each other get a table of their own.
    """
    groups: list[list[dict[str, Any]]] = []
    room = 0
    for model in models:
        needed = _least_width(model) + _BORDER
        if needed > room:
            groups.append([])
            room = width - 1 - _LEAST_ROOM_FOR_NAMES
        groups[-1].append(model)
        room -= needed
    return [_table(group, width) for group in groups]


def _table(models: list[dict[str, Any]], width: int) -> Table:
    table = Table(Column(overflow="fold"), Column("on", overflow="fold"))
    spare = (width - 1 - _room_for_names(models, width)) // len(models) - _BORDER
    for model in models:  # a long path is wrapped, a number never
        path = Text(model["checkpoint"])
        table.add_column(path, overflow="fold", width=max(_least_width(model), min(path.cell_len, spare)))
    table.add_row("parameters (M)", "", *(_parameters(model) for model in models), end_section=True)
    for name in dict.fromkeys(name for model in models for name in model["measured"]):
        cells = [model["measured"].get(name) for model in models]
        first = next(cell for cell in cells if cell)
        table.add_row(Text(name), _size(first), *("" if cell is None else _cell(name, cell) for cell in cells))
    return table


def _room_for_names(models: list[dict[str, Any]], width: int) -> int:
    """Return how many columns of the terminal the first two of a table get if numbers leave them: up to half."""
    names = max((len(name) for model in models for name in model["measured"]), default=0)
    sizes = max((len(_size(result)) for model in models for result in model["measured"].values()), default=0)
    return min(names + sizes + 2 * _BORDER, max(_LEAST_ROOM_FOR_NAMES, width // 2))


def _least_width(model: dict[str, Any]) -> int:
    return max(map(len, [_parameters(model), *(_cell(*item) for item in model["measured"].items())]))


def _parameters(model: dict[str, Any]) -> str:
    return f"{model['parameters'] / 1e6:,.1f}"


def _size(result: dict[str, Any]) -> str:
    """Return how much was measured, and for texts the kind of windows."""
    if "windows" in result:
        return f"{result['tokens']:,} tokens, {result['windows']}"
    return f"{result['documents']:,} questions"


def left_out_lines(models: list[dict[str, Any]]) -> list[str]:
    """Return a line for each measure that was left out, with the models and the reason."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for name, reason in model.get("left_out", {}).items():
            by_reason.setdefault((name, reason), []).append(model["checkpoint"])
    lines = []
    for (name, reason), paths in by_reason.items():
        whose = "" if len(paths) == len(models) else f" of {', '.join(paths)}"
        lines.append(f"left out: {name}{whose} ({reason})")
    return lines


def _cell(name: str, result: dict[str, Any]) -> str:
    """Format value and standard error; shares are shown in per cent."""
    metric = name.rpartition("/")[2].partition(",")[0]
    scale, digits = (100, 2) if metric in _SHARES else (1, 4 if metric.startswith(_PRECISE) else 3)
    numbers = [result["value"]] if result["stderr"] is None else [result["value"], result["stderr"]]
    return " ± ".join(f"{scale * number:,.{digits}f}" if number < 1e6 else f"{number:.3g}" for number in numbers)
