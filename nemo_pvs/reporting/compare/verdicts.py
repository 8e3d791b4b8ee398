"""What a report concludes: whether a finding of the paper holds, and whether a model is as good as its parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from nemo_pvs.reporting.numbers import fixed
from nemo_pvs.reporting.statistics import MeanEstimate, Recovered

Judgement = Literal["holds", "fails", "undecided"]
Unit = Literal["points", "nats"]
"""Percentage points of accuracy and other shares, or nats per token of loss and divergence."""


class NamedEstimate(NamedTuple):
    """A number that a finding is judged by, nats per token."""

    name: str
    estimate: MeanEstimate


@dataclass(frozen=True)
class PaperFinding:
    """A finding of the paper, judged by the intervals of these runs."""

    name: str
    """``1a``."""
    source: str
    """Where the paper states it."""
    statement: str
    judgement: Judgement
    reason: str
    """A sentence with the numbers."""
    evidence: tuple[NamedEstimate, ...]
    missing: tuple[str, ...]
    """What the finding needs and these runs lack."""


@dataclass(frozen=True)
class NonInferiority:
    """A test whether a pruned arm is as good as its parent, to within a margin."""

    arm: str
    measure: str
    """A score's name, or ``validation loss``."""
    unit: Unit
    margin: float
    difference: MeanEstimate | None
    """In ``unit``, positive if the arm is better than the parent; None if they cannot be compared."""
    verdict: Recovered
    basis: str
    """What the error is taken over: ``100 questions and 3 seeds``; or why there is none."""

    @property
    def sentence(self) -> str:
        """The verdict in words, with the bound that decides it."""
        return f"{self.arm}, {self.measure}: {self.words}"

    @property
    def words(self) -> str:
        """The verdict with the one-sided bounds, without the names."""
        margin = f"{self.margin:g} {self.unit}"
        if self.difference is None or self.difference.stderr is None:
            return f"undecided ({self.basis})"
        decimals = 2 if self.unit == "points" else 3
        low = fixed(self.difference.lower_bound, decimals, signed=True)
        high = fixed(self.difference.upper_bound, decimals, signed=True)
        bounds = {
            "equivalent": f"equivalent within {margin} (one-sided 95 % bounds {low} and {high}",
            "not inferior": f"not inferior by more than {margin} (one-sided 95 % bound {low}",
            "inferior": f"inferior by more than {margin} (one-sided 95 % bound {high}",
            "undecided": f"undecided at {margin} (one-sided 95 % bounds {low} and {high}",
        }
        return f"{bounds[self.verdict]}, over {self.basis})"
