"""Losses, perplexities and gaps over the seeds of a comparison, with their intervals.

Gaps are paired by seed: the two arms that share a seed, and with it their data, are subtracted first.
"""

from __future__ import annotations

import math

from nemo_pvs.ledger.budget import EqualBudget
from nemo_pvs.reporting.compare.runs import Run, SideBySide, parents_of
from nemo_pvs.reporting.results import ArmResult, gap_between, gaps_along
from nemo_pvs.reporting.statistics import MeanEstimate, mean_estimate

EQUAL_TRAINING: EqualBudget = "equal-training-tokens"
EQUAL_TOTAL: EqualBudget = "equal-total-tokens"

SeedPair = tuple[str, str]
"""The seeds of the weights and of the data's order."""


def parent_loss(runs: SideBySide) -> MeanEstimate | None:
    """Return the parent's validation loss, nats per token; over the seeds if each has its own parent."""
    losses = [parent.validation_loss for parent in parents_of(runs.runs)]
    return mean_estimate([loss for loss in losses if loss is not None])


def final_loss(runs: SideBySide, arm: ArmResult) -> MeanEstimate | None:
    """Return the last validation loss, nats per token."""
    losses = [repeated.validation_loss for _, repeated in runs.repetitions[arm.name]]
    return mean_estimate([loss for loss in losses if loss is not None])


def perplexity_after(runs: SideBySide, arm: ArmResult) -> MeanEstimate | None:
    """Return the test perplexity after training."""
    values = [repeated.test_perplexity_after for _, repeated in runs.repetitions[arm.name]]
    return mean_estimate([value for value in values if value is not None])


def bits_per_byte_after(runs: SideBySide, arm: ArmResult) -> MeanEstimate | None:
    """Return the test cross-entropy after training, bits per byte."""
    values = [repeated.test_bits_per_byte_after for _, repeated in runs.repetitions[arm.name]]
    return mean_estimate([value for value in values if value is not None])


def gap(runs: SideBySide, arm: ArmResult, setting: EqualBudget = EQUAL_TRAINING) -> MeanEstimate | None:
    """Return the gap of a pruned arm to its counterpart from scratch, nats per token; None if there is none.

    Arms that share no seed, which only ``--force`` puts together, have the gap of their means and no interval.
    """
    values = list(gap_by_seed(runs, arm, setting).values())
    if not values:
        of_means = runs.results.gap(arm, setting)
        values = [] if of_means is None else [of_means]
    return mean_estimate(values)


def gap_by_seed(runs: SideBySide, arm: ArmResult, setting: EqualBudget = EQUAL_TRAINING) -> dict[SeedPair, float]:
    """Return the gap between the two arms of each seed that both have, in nats per token."""
    scratch = runs.results.scratch_of(arm, setting)
    gaps = {}
    for seed, (ours, theirs) in _pairs(runs, arm, scratch).items():
        value = gap_between(ours, theirs, setting)
        if value is not None:
            gaps[seed] = value
    return gaps


def gap_curve(runs: SideBySide, arm: ArmResult) -> list[tuple[int, MeanEstimate]]:
    """Return training tokens and gaps at equal training tokens along the training.

    These are the points at which all seeds measured both losses and all of them are finite.
    """
    pairs = _pairs(runs, arm, runs.results.scratch_of(arm))
    curves = [gaps_along(ours, theirs) for ours, theirs in pairs.values()]
    if not curves:
        return []
    points = []
    for tokens in sorted(curves[0]):
        gaps = [curve.get(tokens, math.nan) for curve in curves]
        over_seeds = mean_estimate(gaps)
        if over_seeds is not None and all(map(math.isfinite, gaps)):
            points.append((tokens, over_seeds))
    return points


def _pairs(runs: SideBySide, arm: ArmResult, scratch: ArmResult | None) -> dict[SeedPair, tuple[ArmResult, ArmResult]]:
    """Return the repetitions of two arms that have the same seed; they may be of different runs."""
    if scratch is None:
        return {}
    counterparts = {_seed(run): repeated for run, repeated in runs.repetitions[scratch.name]}
    pairs = {}
    for run, repeated in runs.repetitions[arm.name]:
        if _seed(run) in counterparts:
            pairs[_seed(run)] = (repeated, counterparts[_seed(run)])
    return pairs


def _seed(run: Run) -> SeedPair:
    return str(run.seed), str(run.data_seed)
