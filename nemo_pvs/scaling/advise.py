"""Prune or train from scratch? A verdict for each way to count the parent, from the evidence that reaches it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.published import Published, published
from nemo_pvs.reporting.results import Results
from nemo_pvs.scaling.evidence import Evidence, Question, Setting, own_evidence, published_evidence, written

Choice = Literal["prune", "scratch", "either", "unknown"]
Sureness = Literal["likely", "tentative", "unknown"]

NOISE = {"nats": 0.0355, "points": 1.0}
"""Differences up to these are taken for none. Nats: the standard deviation of a difference of two published losses, as
curves fitted to them leave it: 0.025 each over the 8 degrees of freedom that 20 points leave 12 parameters
(tests/scaling). It is no interval of 95 %, which would be 0.08; a verdict is likely only where two comparisons agree.
Points: our choice; all published comparisons are single runs, and most differ by 0.4 to 1.4."""
_FINEST_FIRST = ("sparse", "width", "depth")


@dataclass(frozen=True)
class Verdict:
    """The answer under one way to count the parent."""

    setting: Setting
    choice: Choice
    sureness: Sureness
    granularity: str | None
    """At which to prune; None where the advice is not to, or is unknown."""
    summary: str
    """One or two sentences."""
    evidence: list[Evidence]
    """What the verdict rests on; where it is unknown, all that there is, with the reasons why it does not reach."""


def advise(question: Question, runs: Iterable[Results] = (), paper: Published | None = None) -> list[Verdict]:
    """Answer a question: at equal training tokens and, if the parent's tokens are given, at equal total tokens.

    Own runs that reach the question decide alone; only without any the published points do.

    Raises:
        UserError: the question has no sense.
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
    evidence = [*own_evidence(question, runs), *published_evidence(question, paper)]
    settings: list[Setting] = ["equal training tokens"]
    if question.parent_tokens is not None:
        settings.append("equal total tokens")
    verdicts = [_verdict(setting, [one for one in evidence if one.setting == setting]) for setting in settings]
    return [_with_remark(verdict, question, paper) for verdict in verdicts]


def _with_remark(verdict: Verdict, question: Question, paper: Published) -> Verdict:
    """Add what the paper says about a parent that was trained on far more than its own."""
    published_parent = verdict.choice != "unknown" and not any(one.own for one in verdict.evidence)
    if not published_parent or (question.parent_tokens or 0) <= 2 * paper.parent_tokens:
        return verdict
    remark = f" That is for a parent of {written(paper.parent_tokens)} tokens; {paper.better_parent}."
    return replace(verdict, summary=verdict.summary + remark)


def _verdict(setting: Setting, evidence: list[Evidence]) -> Verdict:
    reaching = [one for one in evidence if one.reaches]
    used = [one for one in reaching if one.own] or reaching
    if not used:
        return Verdict(
            setting,
            "unknown",
            "unknown",
            None,
            "The evidence does not reach this question. Run both arms at a size and at token counts that you can "
            "afford, and ask again with --runs.",
            evidence,
        )
    choices = {name: _choice([one for one in used if one.granularity == name]) for name in _granularities(used)}
    winners = [name for name, choice in choices.items() if choice == "prune"]
    spoken = "; ".join(f"{name}: {_SPOKEN[choice]}" for name, choice in choices.items())
    if winners:
        choice: Choice = "prune"
        granularity = _best(used, winners)
    else:
        choice = "scratch" if all(one == "scratch" for one in choices.values()) else "either"
        granularity = None
    summary = f"By granularity: {spoken}."
    if granularity == "sparse":
        summary += " Zeros among the weights save time only on hardware that skips them."
    return Verdict(setting, choice, _sureness(used, choice), granularity, summary, used)


_SPOKEN = {
    "prune": "pruned is better",
    "scratch": "scratch is better",
    "either": "no difference that single runs could tell from noise",
}


def _granularities(evidence: Sequence[Evidence]) -> list[str]:
    return [name for name in _FINEST_FIRST if any(one.granularity == name for one in evidence)]


def _choice(evidence: Sequence[Evidence]) -> Choice:
    """Return what most of the comparisons at one granularity say."""
    signs = [_sign(one) for one in evidence]
    if signs.count(1) > len(signs) / 2:
        return "prune"
    return "scratch" if signs.count(-1) > len(signs) / 2 else "either"


def _sign(evidence: Evidence) -> int:
    if abs(evidence.advantage) <= NOISE[evidence.unit]:
        return 0
    return 1 if evidence.advantage > 0 else -1


def _best(evidence: Sequence[Evidence], winners: Sequence[str]) -> str:
    """Return the granularity with the largest advantage in noises, which makes nats and points comparable."""

    def advantage(name: str) -> float:
        return max(one.advantage / NOISE[one.unit] for one in evidence if one.granularity == name)

    return max(winners, key=advantage)


def _sureness(evidence: Sequence[Evidence], choice: Choice) -> Sureness:
    """Return ``likely`` where two comparisons back a choice (one's own counts twice) and none speaks against it."""
    signs = [_sign(one) for one in evidence for _ in range(2 if one.own else 1)]
    sign = {"prune": 1, "scratch": -1}.get(choice, 0)
    return "likely" if sign and signs.count(sign) >= 2 and -sign not in signs else "tentative"
