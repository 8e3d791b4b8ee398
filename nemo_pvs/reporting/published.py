"""The published points of the paper (``published.yaml``), for comparison with a user's own runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import yaml

from nemo_pvs.reporting.results import Point

CoarseGranularity = Literal["depth", "width", "sparse"]
"""What pruning removes: layers, channels and heads, or single weights."""


@dataclass(frozen=True)
class PublishedCurve:
    """Validation losses of one method and initialisation; every point is the end of a separate, fully decayed run."""

    method: str
    granularity: CoarseGranularity
    initialisation: Literal["pruned", "random"]
    ratio: float
    """The paper's nominal share to remove; the share of all parameters is smaller."""
    parameters: int
    points: tuple[Point, ...]
    """Points with the tokens actually seen: steps x 4,194,304."""
    source: str

    @property
    def name(self) -> str:
        """For legends: ``minitron-depth, pruned (arXiv 2606.14150)``."""
        return f"{self.method}, {self.initialisation} ({self.source.split(',')[0]})"


@dataclass(frozen=True)
class PublishedAccuracy:
    """Average zero-shot accuracy of one method at equal total tokens, per cent."""

    method: str
    granularity: CoarseGranularity
    pruned: float
    random: float
    source: str


@dataclass(frozen=True)
class PublishedAdvantage:
    """Average zero-shot accuracy of pruned minus scratch at equal training tokens, in points."""

    method: str
    granularity: CoarseGranularity
    ratio: float
    parameters: int
    points: float
    source: str


@dataclass(frozen=True)
class PublishedPerplexity:
    """Perplexity of one method on a text, at equal training and at equal total tokens."""

    method: str
    granularity: CoarseGranularity
    ratio: float
    text: str
    random: float
    """From scratch on equal training tokens."""
    pruned: float
    random_of_total: float
    """From scratch on equal total tokens."""
    source: str


@dataclass(frozen=True)
class Published:
    """All numbers that could be read from the paper."""

    parent_parameters: int
    parent_tokens: int
    parent_loss: float
    """Validation loss, nats per token."""
    better_parent: str
    """The paper's statement about a parent that was trained on far more tokens."""
    curves: tuple[PublishedCurve, ...]
    accuracies: tuple[PublishedAccuracy, ...]
    accuracy_tokens: int
    """Training tokens of the pruned arms of ``accuracies`` and of both arms of ``advantages``: the label's 50B."""
    accuracy_ratio: float
    """Nominal ratio of ``accuracies``."""
    advantages: tuple[PublishedAdvantage, ...]
    perplexities: tuple[PublishedPerplexity, ...]
    """After as many training tokens as ``accuracies``."""


@cache
def published() -> Published:
    """Return the paper's points with exact token counts."""
    values = yaml.safe_load(resources.files("nemo_pvs.reporting").joinpath("published.yaml").read_text())
    paper, per_step, parent = values["paper"], values["tokens_per_step"], values["parent"]

    def sourced(entry: dict[str, object]) -> dict[str, object]:
        return {**entry, "source": f"{paper}, {entry['source']}"}

    initialisations: tuple[Literal["pruned", "random"], ...] = ("pruned", "random")
    curves = []
    for entry in values["losses"]:
        for initialisation in initialisations:
            losses = zip(entry["steps"], entry[initialisation], strict=True)
            curve = PublishedCurve(
                method=entry["method"],
                granularity=entry["granularity"],
                initialisation=initialisation,
                ratio=entry["ratio"],
                parameters=entry["parameters"],
                points=tuple(Point(steps, steps * per_step, loss) for steps, loss in losses),
                source=f"{paper}, {entry['source']}",
            )
            curves.append(curve)
    return Published(
        parent_parameters=parent["parameters"],
        parent_tokens=parent["steps"] * per_step,
        parent_loss=parent["validation_loss"],
        better_parent=values["better_parent"],
        curves=tuple(curves),
        accuracies=tuple(PublishedAccuracy(**sourced(entry)) for entry in values["accuracies"]),  # type: ignore[arg-type]
        accuracy_tokens=12500 * per_step,
        accuracy_ratio=values["accuracy_ratio"],
        advantages=tuple(PublishedAdvantage(**sourced(entry)) for entry in values["advantages"]),  # type: ignore[arg-type]
        perplexities=tuple(PublishedPerplexity(**sourced(entry)) for entry in values["perplexities"]),  # type: ignore[arg-type]
    )
