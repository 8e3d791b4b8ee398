"""Prune or train from scratch? A verdict for each way to count the parent's tokens, from the applicable evidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.published import Published, published
from nemo_pvs.reporting.results import Results
from nemo_pvs.scaling.evidence import (
    Evidence,
    EvidenceSetting,
    Question,
    own_evidence,
    packaged_runs,
    published_evidence,
    written,
)

Choice = Literal["prune", "scratch", "either", "unknown"]
Sureness = Literal["likely", "tentative", "unknown"]

NOISE = {"nats": 0.0355, "points": 1.0}
"""Differences up to these count as none. Nats: the standard deviation of a difference of two published losses,
estimated from curves fitted to them: 0.025 each, with the 8 degrees of freedom of 20 points and 12 parameters
(tests/scaling). It is not a 95 % interval, which would be 0.08; a verdict is likely only if two comparisons agree.
Points: our choice; all published comparisons are single runs, and most differ by 0.4 to 1.4."""
_FINEST_FIRST = ("sparse", "width", "depth")


@dataclass(frozen=True)
class Verdict:
    """The answer for one way to count the parent's tokens."""

    setting: EvidenceSetting
    choice: Choice
    sureness: Sureness
    granularity: str | None
    """The recommended granularity of pruning; None if the choice is not to prune."""
    summary: str
    """One or two sentences."""
    evidence: list[Evidence]
    """The evidence used; if the choice is unknown, all evidence, with the reasons why it does not apply."""


def advise(question: Question, runs: Iterable[Results] = (), paper: Published | None = None) -> list[Verdict]:
    """Answer a question: at equal training tokens and, if the parent's tokens are given, at equal total tokens.

    If any of the user's own runs apply to the question, they alone decide; otherwise the published points do.

    Args:
        question: What to train.
        runs: Results of the user's own finished runs.
        paper: Published results; by default those of the package.

    Raises:
        UserError: a number of the question is not positive, or the model is not smaller than its parent.
    """
    for name, value in (
        ("parameters", question.parameters),
        ("training tokens", question.train_tokens),
        ("parent tokens", question.parent_tokens),
    ):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{value:g} {name} make no sense; give a number above 0.")
    if question.ratio <= 0:
        raise UserError(
            f"A model of {written(question.parameters)} parameters cannot be pruned from one of "
            f"{written(question.parent_parameters)}; give a larger --parent-params."
        )
    paper = paper or published()
    packaged = own_evidence(question, packaged_runs(), packaged=True)
    evidence = [*own_evidence(question, runs), *packaged, *published_evidence(question, paper)]
    settings: list[EvidenceSetting] = ["equal training tokens"]
    if question.parent_tokens is not None:
        settings.append("equal total tokens")
    verdicts = [_verdict(setting, [item for item in evidence if item.setting == setting]) for setting in settings]
    return [_with_remark(verdict, question, paper) for verdict in verdicts]


def _with_remark(verdict: Verdict, question: Question, paper: Published) -> Verdict:
    """Add what the paper says about a parent that was trained on far more tokens than the paper's."""
    published_parent = verdict.choice != "unknown" and all(item.published for item in verdict.evidence)
    if not published_parent or (question.parent_tokens or 0) <= 2 * paper.parent_tokens:
        return verdict
    remark = f" That is for a parent of {written(paper.parent_tokens)} tokens; {paper.better_parent}."
    return replace(verdict, summary=verdict.summary + remark)


def _verdict(setting: EvidenceSetting, evidence: list[Evidence]) -> Verdict:
    applicable = [item for item in evidence if item.reaches]
    used = [item for item in applicable if item.own] or applicable
    if not used:
        return Verdict(
            setting,
            "unknown",
            "unknown",
            None,
            "The evidence does not cover this question. Run both arms at a size and at token counts that you can "
            "afford, and ask again with --runs.",
            evidence,
        )
    choices = {name: _choice([item for item in used if item.granularity == name]) for name in _granularities(used)}
    winners = [name for name, choice in choices.items() if choice == "prune"]
    described = "; ".join(f"{name}: {_DESCRIPTIONS[choice]}" for name, choice in choices.items())
    if winners:
        choice: Choice = "prune"
        granularity = _best(used, winners)
    else:
        choice = "scratch" if all(value == "scratch" for value in choices.values()) else "either"
        granularity = None
    summary = f"By granularity: {described}."
    if granularity == "sparse":
        summary += " Zeros among the weights save time only on hardware that skips them."
    return Verdict(setting, choice, _sureness(used, choice), granularity, summary, used)


_DESCRIPTIONS = {
    "prune": "pruned is better",
    "scratch": "scratch is better",
    "either": "no difference that single runs could tell from noise",
}


def _granularities(evidence: Sequence[Evidence]) -> list[str]:
    return [name for name in _FINEST_FIRST if any(item.granularity == name for item in evidence)]


def _choice(evidence: Sequence[Evidence]) -> Choice:
    """Return the choice of the majority of comparisons at one granularity."""
    signs = [_sign(item) for item in evidence]
    if signs.count(1) > len(signs) / 2:
        return "prune"
    return "scratch" if signs.count(-1) > len(signs) / 2 else "either"


def _sign(evidence: Evidence) -> int:
    if abs(evidence.advantage) <= NOISE[evidence.unit]:
        return 0
    return 1 if evidence.advantage > 0 else -1


def _best(evidence: Sequence[Evidence], winners: Sequence[str]) -> str:
    """Return the granularity with the largest advantage in units of ``NOISE``, so that nats and points compare."""

    def advantage(name: str) -> float:
        return max(item.advantage / NOISE[item.unit] for item in evidence if item.granularity == name)

    return max(winners, key=advantage)


def _sureness(evidence: Sequence[Evidence], choice: Choice) -> Sureness:
    """Return ``likely`` if two comparisons support a choice (own runs count twice) and none contradicts it."""
    signs = [_sign(item) for item in evidence for _ in range(2 if item.own else 1)]
    sign = {"prune": 1, "scratch": -1}.get(choice, 0)
    return "likely" if sign and signs.count(sign) >= 2 and -sign not in signs else "tentative"
