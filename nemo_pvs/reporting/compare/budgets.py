"""Pruned and scratch by method, share removed and budget, as in Table 2 of arXiv 2606.14150, and the paper's own."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pvs.recipe.target import DENSE
from nemo_pvs.reporting.compare.estimates import EQUAL_TOTAL, EQUAL_TRAINING, gap
from nemo_pvs.reporting.compare.removed import GRANULARITIES, Granularity, granularity, method_of, removed_share
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.published import PublishedCurve, published
from nemo_pvs.reporting.results import ArmResult
from nemo_pvs.reporting.statistics import MeanEstimate

LOSS = "validation loss (nats)"
ACCURACY = "average accuracy (%)"


@dataclass(frozen=True)
class BudgetRow:
    """A pruned model next to scratch of equal training and of equal total tokens, in one quantity."""

    method: str
    granularity: Granularity | None
    target: str | None
    """The target in these runs; None for a row of the paper."""
    removed: float | None
    """Share of all parameters removed; the nominal ratio in a row of the paper."""
    tokens: int | None
    """Training tokens of the pruned model."""
    quantity: str
    scratch: float | None
    """From scratch, on equal training tokens."""
    pruned: float | None
    scratch_of_total: float | None
    """From scratch, on equal total tokens."""
    gap: MeanEstimate | None
    """How far pruning is ahead at equal training tokens; positive if it is, whether low or high is better."""
    gap_of_total: MeanEstimate | None
    """The same at equal total tokens."""
    source: str = "these runs"


def budget_rows(runs: SideBySide, *, reference: bool = False) -> list[BudgetRow]:
    """Return a row per pruned arm, from coarse to fine granularity.

    Args:
        runs: The runs.
        reference: Also return the numbers of the paper, after the runs' rows of the same method.
    """
    rows = []
    for arm in runs.results.arms:
        if arm.initialisation == "pruned" and arm.method != DENSE:
            rows.append(_own(runs, arm))
    if reference:
        rows += _published_losses() + _published_perplexities() + _published_accuracies()
    return sorted(rows, key=_order)


def _own(runs: SideBySide, arm: ArmResult) -> BudgetRow:
    scratch = runs.results.scratch_of(arm, EQUAL_TRAINING)
    of_total = runs.results.scratch_of(arm, EQUAL_TOTAL)
    return BudgetRow(
        method=method_of(runs, arm),
        granularity=granularity(runs, arm),
        target=arm.target,
        removed=removed_share(runs.results, arm),
        tokens=arm.ledger.training.tokens if arm.ledger.charges else None,
        quantity=LOSS,
        scratch=scratch.validation_loss if scratch else None,
        pruned=arm.validation_loss,
        scratch_of_total=of_total.validation_loss if of_total else None,
        gap=gap(runs, arm, EQUAL_TRAINING),
        gap_of_total=gap(runs, arm, EQUAL_TOTAL),
    )


def _published_losses() -> list[BudgetRow]:
    paper = published()
    scratch = {curve.method: _by_tokens(curve) for curve in paper.curves if curve.initialisation == "random"}
    rows = []
    for curve in paper.curves:
        if curve.initialisation == "random":
            continue
        for tokens, loss in _by_tokens(curve).items():
            equal, of_total = (
                scratch[curve.method].get(tokens),
                scratch[curve.method].get(tokens + paper.parent_tokens),
            )
            rows.append(
                BudgetRow(
                    curve.method,
                    _granularity(curve.method, curve.granularity),
                    None,
                    curve.ratio,
                    tokens,
                    LOSS,
                    equal,
                    loss,
                    of_total,
                    None if equal is None else MeanEstimate(equal - loss, 1),
                    None if of_total is None else MeanEstimate(of_total - loss, 1),
                    curve.source,
                )
            )
    return rows


def _published_perplexities() -> list[BudgetRow]:
    rows = []
    for entry in published().perplexities:
        rows.append(
            BudgetRow(
                entry.method,
                _granularity(entry.method, entry.granularity),
                None,
                entry.ratio,
                published().accuracy_tokens,
                f"{entry.text} perplexity",
                entry.random,
                entry.pruned,
                entry.random_of_total,
                MeanEstimate(entry.random - entry.pruned, 1),
                MeanEstimate(entry.random_of_total - entry.pruned, 1),
                entry.source,
            )
        )
    return rows


def _published_accuracies() -> list[BudgetRow]:
    paper, rows = published(), []
    for entry in paper.accuracies:
        rows.append(
            BudgetRow(
                entry.method,
                _granularity(entry.method, entry.granularity),
                None,
                paper.accuracy_ratio,
                paper.accuracy_tokens,
                ACCURACY,
                None,
                entry.pruned,
                entry.random,
                None,
                MeanEstimate(entry.pruned - entry.random, 1),
                entry.source,
            )
        )
    for advantage in paper.advantages:
        rows.append(
            BudgetRow(
                advantage.method,
                _granularity(advantage.method, advantage.granularity),
                None,
                advantage.ratio,
                paper.accuracy_tokens,
                ACCURACY,
                None,
                None,
                None,
                MeanEstimate(advantage.points, 1),
                None,
                advantage.source,
            )
        )
    return rows


def _by_tokens(curve: PublishedCurve) -> dict[int, float]:
    return {point.tokens: point.loss for point in curve.points}


def _granularity(method: str, published_as: str) -> Granularity:
    if published_as == "sparse":
        return "N:M" if ":" in method else "unstructured"
    return "depth" if published_as == "depth" else "width"


def _order(row: BudgetRow) -> tuple[int, str, bool, float, str, int]:
    rank = GRANULARITIES.index(row.granularity) if row.granularity else len(GRANULARITIES)
    return rank, row.method, row.target is None, row.removed or 0.0, row.quantity, row.tokens or 0
