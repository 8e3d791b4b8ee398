"""Judge the findings of "Small LLMs: Pruning vs. Training from Scratch" (arXiv 2606.14150) by the intervals of runs.

Each comparison is judged by its 95 % interval over seeds. A claim about every comparison holds if each one's own
interval agrees (an intersection-union test, which needs no correction); where one of several comparisons suffices, to
contradict such a claim or to support a claim about some, its interval must hold for all of them together (Bonferroni).

What is missing is named and never filled in: a finding about all comparisons does not hold while one of them is
missing, but may fail without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from nemo_pvs.ledger.budget import EqualBudget
from nemo_pvs.recipe.target import DENSE
from nemo_pvs.reporting.compare.estimates import EQUAL_TOTAL, EQUAL_TRAINING, gap, gap_by_seed
from nemo_pvs.reporting.compare.removed import FINE, GRANULARITIES, granularity, method_of, removed_share
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.compare.verdicts import Judgement, NamedEstimate, PaperFinding
from nemo_pvs.reporting.numbers import and_list, fixed, plus_minus, scaled, unit_of
from nemo_pvs.reporting.results import ArmResult
from nemo_pvs.reporting.statistics import MeanEstimate, mean_estimate

_EQUAL_TRAINING = "arXiv 2606.14150, finding 1 (equal training tokens; Figure 1, left)"
_EQUAL_TOTAL = "arXiv 2606.14150, finding 2 (equal total tokens; Figure 1, right, and Table 2)"
_LISTED = 6
"""Comparisons that a sentence lists; it gives the range of more."""
_SAME_SHARE = 0.01
"""Shares removed that differ by less are one ratio."""


def judge_findings(runs: SideBySide) -> tuple[PaperFinding, ...]:
    """Return the findings with their judgements; none if no arm was pruned from a parent."""
    if runs.results.parent is None or not _pruned(runs):
        return ()
    judges: tuple[Callable[[SideBySide], PaperFinding], ...] = (
        ahead_at_equal_training_tokens,
        gap_shrinks_with_tokens,
        gap_shrinks_with_ratio,
        fine_is_ahead_at_equal_total_tokens,
        depth_is_caught_at_equal_total_tokens,
        width_is_caught_at_equal_total_tokens,
    )
    return tuple(judge(runs) for judge in judges)


def ahead_at_equal_training_tokens(runs: SideBySide) -> PaperFinding:
    """Judge that a pruned start always beats a random one after equal training tokens."""
    evidence, missing = _gaps(runs, _pruned(runs), EQUAL_TRAINING), _absent(runs)
    for arm in _pruned(runs):
        if runs.results.scratch_of(arm) is None and _has_random(runs, arm):
            missing.append(f"the arm from random weights with the training tokens of “{arm.name}”")
    statement = "At equal training tokens, pruning always beats training from scratch"
    return _judge(runs, "1a", _EQUAL_TRAINING, statement, evidence, missing)


def gap_shrinks_with_tokens(runs: SideBySide) -> PaperFinding:
    """Judge that the gap at equal training tokens is smaller after more tokens.

    Per target, the gap at the smallest budget minus that at the largest. Points along one training do not count: its
    learning rate has not decayed there.
    """
    evidence: list[NamedEstimate] = []
    lacking = []
    for target, arms in _by_target(runs).items():
        with_gap = sorted((arm for arm in arms if gap_by_seed(runs, arm)), key=_tokens)
        if not with_gap or _tokens(with_gap[0]) == _tokens(with_gap[-1]):
            lacking.append(target)
            continue
        few, many = with_gap[0], with_gap[-1]
        name = f"{target}, from {_short(_tokens(few))} to {_short(_tokens(many))} tokens"
        evidence += _drop(name, runs, few, many)
    missing = [f"gaps at two budgets of training tokens on {and_list(lacking)}"] if lacking else []
    return _judge(runs, "1b", _EQUAL_TRAINING, "The gap shrinks with more training tokens", evidence, missing)


def gap_shrinks_with_ratio(runs: SideBySide) -> PaperFinding:
    """Judge that the gap at equal training tokens is smaller where more was removed.

    Per method and budget, the gap at the smallest share removed minus that at the largest.
    """
    groups: dict[tuple[str, int, int, bool], list[ArmResult]] = {}
    for arm in _pruned(runs):
        if gap_by_seed(runs, arm):
            # Gaps per token of different vocabularies cannot be compared, nor those with a teacher and without.
            taught = any(charge.is_teacher_pass for charge in arm.ledger.charges)
            groups.setdefault((method_of(runs, arm), _tokens(arm), arm.shape.vocab, taught), []).append(arm)
    evidence: list[NamedEstimate] = []
    for (method, tokens, _, taught), arms in groups.items():
        ordered = sorted(arms, key=lambda arm: arm.shape.parameters - arm.masked_parameters, reverse=True)
        least, most = (removed_share(runs.results, arm) or 0.0 for arm in (ordered[0], ordered[-1]))
        if most - least < _SAME_SHARE:
            continue
        taught_by = " with a teacher" if taught else ""
        share = f"from {fixed(100 * least, 0)} to {fixed(100 * most, 0)} % removed"
        name = f"{method}{taught_by} at {_short(tokens)} tokens, {share}"
        evidence += _drop(name, runs, ordered[0], ordered[-1])
    missing = [] if evidence else ["gaps of one method at two shares removed and one budget"]
    return _judge(runs, "1c", _EQUAL_TRAINING, "The gap shrinks as more is removed", evidence, missing)


def fine_is_ahead_at_equal_total_tokens(runs: SideBySide) -> PaperFinding:
    """Judge that models with single weights removed still win at equal total tokens."""
    evidence, missing = _at_equal_total(runs, FINE, "weights set to zero (unstructured or N:M)")
    statement = "At equal total tokens, fine pruning (single weights) still beats training from scratch"
    return _judge(runs, "2a", _EQUAL_TOTAL, statement, evidence, missing)


def depth_is_caught_at_equal_total_tokens(runs: SideBySide) -> PaperFinding:
    """Judge that training from scratch is ahead of pruning by depth at equal total tokens.

    The paper says "matched or surpassed". An interval cannot show equality, so only a lead of scratch decides.
    """
    evidence, missing = _at_equal_total(runs, ("depth",), "layers removed")
    statement = "At equal total tokens, training from scratch beats coarse pruning (depth)"
    return _judge(runs, "2b", _EQUAL_TOTAL, statement, evidence, missing, side=-1)


def width_is_caught_at_equal_total_tokens(runs: SideBySide) -> PaperFinding:
    """Judge that training from scratch is ahead of some pruning by width at equal total tokens."""
    evidence, missing = _at_equal_total(runs, ("width",), "width removed")
    statement = "At equal total tokens, training from scratch beats some pruning by width"
    return _judge(runs, "2c", _EQUAL_TOTAL, statement, evidence, missing, side=-1, every=False)


def _pruned(runs: SideBySide) -> list[ArmResult]:
    return [arm for arm in runs.results.arms if arm.initialisation == "pruned" and arm.method != DENSE]


def _by_target(runs: SideBySide) -> dict[str, list[ArmResult]]:
    """Return the pruned arms by target, of targets that have arms from random weights."""
    targets: dict[str, list[ArmResult]] = {}
    for arm in _pruned(runs):
        if _has_random(runs, arm):
            targets.setdefault(arm.target, []).append(arm)
    return targets


def _has_random(runs: SideBySide, arm: ArmResult) -> bool:
    return any(other.initialisation == "random" for other in runs.results.targets[arm.target])


def _tokens(arm: ArmResult) -> int:
    return arm.ledger.training.tokens or 0


def _short(tokens: int) -> str:
    unit = unit_of([tokens])
    return scaled(tokens, unit) + unit[1]


def _gaps(runs: SideBySide, arms: Sequence[ArmResult], setting: EqualBudget) -> list[NamedEstimate]:
    """Return the gaps under a setting of the arms that have a counterpart."""
    evidence = []
    for arm in arms:
        over_seeds = gap(runs, arm, setting)
        if over_seeds is not None:
            evidence.append(NamedEstimate(arm.name, over_seeds))
    return evidence


def _absent(runs: SideBySide, granularities: Collection[str] = GRANULARITIES) -> list[str]:
    """Return the arms that a recipe plans but no run has, of targets that have or may have these granularities."""
    absent = []
    for target, start in runs.missing:
        arms = runs.results.targets.get(target, [])
        if not arms or granularity(runs, arms[0]) in granularities:
            absent.append(f"the arm from {'the pruned parent' if start == 'pruned' else 'random weights'} on {target}")
    return absent


def _at_equal_total(
    runs: SideBySide, granularities: Collection[str], removed: str
) -> tuple[list[NamedEstimate], list[str]]:
    """Return the gaps at equal total tokens at some granularities, and the targets that have none.

    Left out is what has equal training tokens as well, since a teacher is charged to both: the paper's arms from
    scratch are trained on the parent's tokens instead.
    """
    targets: dict[str, list[ArmResult]] = {}
    for target, arms in _by_target(runs).items():
        of_kind = [arm for arm in arms if granularity(runs, arm) in granularities and not _is_of_training(runs, arm)]
        if of_kind:
            targets[target] = of_kind
    evidence: list[NamedEstimate] = []
    missing = _absent(runs, granularities)
    for target, arms in targets.items():
        gaps = _gaps(runs, arms, EQUAL_TOTAL)
        evidence += gaps
        if not gaps:
            missing.append(f"an arm from random weights with the total tokens of a pruned one on {target}")
    if not targets and not missing:
        missing.append(f"a model with {removed}, pruned and from random weights")
    return evidence, missing


def _is_of_training(runs: SideBySide, arm: ArmResult) -> bool:
    """Whether an arm's counterpart at equal total tokens is that at equal training tokens."""
    scratch = runs.results.scratch_of(arm, EQUAL_TOTAL)
    return scratch is not None and scratch is runs.results.scratch_of(arm, EQUAL_TRAINING)


def _drop(name: str, runs: SideBySide, first: ArmResult, last: ArmResult) -> list[NamedEstimate]:
    """Return how much smaller the last gap is than the first, subtracted seed by seed."""
    before, after = gap_by_seed(runs, first), gap_by_seed(runs, last)
    drop = mean_estimate([before[seed] - after[seed] for seed in before if seed in after])
    return [] if drop is None else [NamedEstimate(name, drop)]


def _judge(
    runs: SideBySide,
    finding: str,
    source: str,
    statement: str,
    evidence: Sequence[NamedEstimate],
    missing: Sequence[str],
    *,
    side: int = 1,
    every: bool = True,
) -> PaperFinding:
    """Judge a claim that every comparison, or at least one, has its whole interval on one side of zero.

    One comparison that contradicts a claim about every one suffices to make it fail; a claim about at least one fails
    only if all contradict it.
    """
    missing = [*missing, *runs.not_trained]
    count = len(evidence)
    agree = [item for item in evidence if item.estimate.sign_among(1 if every else count) == side]
    against = [item for item in evidence if item.estimate.sign_among(count if every else 1) == -side]
    complete = bool(evidence) and not missing
    holds = complete and len(agree) == count if every else bool(agree)
    fails = bool(against) if every else complete and len(against) == count
    judgement: Judgement = "holds" if holds else "fails" if fails else "undecided"
    reason = _reason(evidence, agree, against, missing)
    return PaperFinding(finding, source, statement, judgement, reason, tuple(evidence), tuple(missing))


def _reason(
    evidence: Sequence[NamedEstimate],
    agree: Sequence[NamedEstimate],
    against: Sequence[NamedEstimate],
    missing: Sequence[str],
) -> str:
    """Return what the intervals say, with the numbers, and what is missing."""
    parts = []
    if evidence:
        diverged = sum(not math.isfinite(item.estimate.mean) for item in evidence)
        single = sum(item.estimate.half_width is None for item in evidence) - diverged
        open_ = [item for item in evidence if item not in agree and item not in against]
        alone = sum(item.estimate.sign != 0 for item in open_)
        said = [(agree, "agree", "agrees"), (against, "contradict", "contradicts"), (open_, "are open", "is open")]
        counts = []
        for items, many, one in said:
            if items:
                counts.append(f"{len(items)} {one if len(items) == 1 else many}{_numbers(items)}")
        comparisons = "1 comparison" if len(evidence) == 1 else f"{len(evidence)} comparisons"
        parts.append(f"Of {comparisons}, in nats per token, {and_list(counts)}.")
        if alone:
            parts.append(
                f"Zero is outside the interval of {alone} of the open ones, but not once it is widened for "
                f"{comparisons} together."
            )
        if single == len(evidence):
            parts.append("One seed has no interval; report runs with at least two seeds.")
        elif single:
            parts.append(f"{single} {'has' if single == 1 else 'have'} no interval.")
        if diverged:
            parts.append(f"{diverged} {'has' if diverged == 1 else 'have'} no interval, as a training diverged.")
    if missing:
        parts.append(f"Missing: {'; '.join(missing)}.")
    return " ".join(parts)


def _numbers(items: Sequence[NamedEstimate]) -> str:
    if not items:
        return ""
    if len(items) <= _LISTED:
        return f" ({'; '.join(f'{item.name} {_shown(item.estimate)}' for item in items)})"
    ordered = sorted(items, key=lambda item: item.estimate.mean)
    least, most = ordered[0], ordered[-1]
    return f" (from {least.name} {_shown(least.estimate)} to {most.name} {_shown(most.estimate)})"


def _shown(value: MeanEstimate) -> str:
    return plus_minus(fixed(value.mean, 3, signed=True), value.half_width, 3)
