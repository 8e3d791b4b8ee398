"""The losses on further texts, as rows for the page and the Markdown file."""

from __future__ import annotations

from nemo_pvs.reporting.numbers import fixed
from nemo_pvs.reporting.results import Results

TEXTS_TITLE = "Loss by text"
TEXTS_NOTE = "After training, nats per token."


def text_headings(results: Results) -> list[str]:
    """Return the headings of the table of further texts; only the first if there are none."""
    return ["Model", *dict.fromkeys(name for _, losses in _models(results) for name in losses)]


def text_cells(results: Results) -> list[list[str]]:
    """Return a row per model with its loss on each further text; none without further texts."""
    _, *names = text_headings(results)
    if not names:
        return []
    return [[model, *(fixed(losses.get(name), 3) for name in names)] for model, losses in _models(results)]


def _models(results: Results) -> list[tuple[str, dict[str, float]]]:
    parent = [(results.parent.label, results.parent.text_losses)] if results.parent else []
    return [*parent, *((arm.name, arm.text_losses) for arm in results.arms)]
