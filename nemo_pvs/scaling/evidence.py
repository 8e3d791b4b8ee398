"""Evidence on pruning against scratch: own runs and the paper's points, with sources and applicability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nemo_pvs.recipe.identity import identity_without_seeds
from nemo_pvs.recipe.target import DENSE
from nemo_pvs.reporting.compare.compare import compare, read_runs
from nemo_pvs.reporting.compare.removed import dimensions_removed
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.published import CoarseGranularity, Published, PublishedCurve
from nemo_pvs.reporting.results import ArmResult, ParentResult, Results, at
from nemo_pvs.scaling.curve import BILLION

EvidenceSetting = Literal["equal training tokens", "equal total tokens"]
"""Whether the parent is free, or its pretraining is charged to the pruned arm."""

_SIMILAR = 2.0
"""Sizes and token counts within this factor are similar; our choice, as is the next."""
_SIMILAR_RATIO = 0.1
_SLACK = 1.05
"""Token counts within this factor are equal: the paper's labels are 4.86 % lower than what was seen."""


@dataclass(frozen=True)
class Question:
    """What a user wants to train."""

    parameters: float
    """Parameters of the small model."""
    train_tokens: float
    parent_parameters: float
    parent_tokens: float | None = None
    """Tokens of the parent's pretraining; None if they need not be counted."""

    @property
    def ratio(self) -> float:
        """The share of the parent's parameters to remove."""
        return 1 - self.parameters / self.parent_parameters


@dataclass(frozen=True)
class Evidence:
    """One comparison of pruned and scratch."""

    setting: EvidenceSetting
    source: str
    own: bool
    """Whether it is the user's own run."""
    published: bool
    """Whether it is from the paper; neither means a run that comes with the package."""
    granularity: CoarseGranularity
    method: str
    advantage: float
    """Advantage of pruned over scratch: nats per token, or points of accuracy. Negative if scratch is better."""
    unit: Literal["nats", "points"]
    statement: str
    """For people: what was compared."""
    out_of_reach: str = ""
    """Why it does not apply to the question; empty if it does."""

    @property
    def reaches(self) -> bool:
        """Whether it applies to the question."""
        return not self.out_of_reach


def granularity_of(arm: ArmResult, parent: ParentResult) -> CoarseGranularity:
    """Return the granularity at which an arm was pruned; both layers and width count as width."""
    if arm.masked_parameters:
        return "sparse"
    return "depth" if dimensions_removed(arm.shape, parent.shape) == "depth" else "width"


def packaged_runs() -> list[Results]:
    """Return the results of the project's own runs that come with the package, each the mean over its seeds."""
    recipes = Path(str(resources.files("nemo_pvs.recipes")))
    runs = sorted({file.parents[1] for file in recipes.glob("*/results/*/seed-*/results.json")})
    return [compare(read_runs([str(run)])).results for run in runs]


def runs_in(folders: Sequence[str]) -> list[Results]:
    """Return the results of finished runs, each the mean over its seeds: they are one comparison, not several.

    Raises:
        UserError: a folder holds no finished run, or one is given twice.
    """
    recipes: dict[str, list[Run]] = {}
    for run in read_runs(folders):
        recipes.setdefault(run.identity, []).append(run)
    return [compare(seeds).results for seeds in recipes.values()]


def own_evidence(question: Question, runs: Iterable[Results], *, packaged: bool = False) -> list[Evidence]:
    """Compare pruned and scratch arms of finished runs, for each target at equal training and equal total tokens.

    Two arms that several runs have, such as those of a recipe and of one that extends it, are one comparison: that of
    the first of these runs.

    Args:
        question: What a user wants to train.
        runs: Results of finished runs.
        packaged: Whether they are the project's own runs (``packaged_runs``), not the user's.
    """
    evidence = []
    counted: set[tuple[EvidenceSetting, str | None, str | None]] = set()
    for results in runs:
        for arm in results.arms:
            if arm.initialisation != "pruned" or arm.method == DENSE or results.parent is None:
                continue
            for setting, scratch, advantage in _comparisons(results, arm):
                arms = _identity(results, arm), _identity(results, scratch)
                if None not in arms and (setting, *arms) in counted:
                    continue
                counted.add((setting, *arms))
                evidence.append(_own(question, results, results.parent, arm, advantage, setting, packaged))
    return evidence


def _comparisons(results: Results, arm: ArmResult) -> list[tuple[EvidenceSetting, ArmResult, float]]:
    """Return the comparisons of a pruned arm: setting, scratch arm and advantage; at most one for each setting."""
    comparisons: list[tuple[EvidenceSetting, ArmResult, float]] = []
    scratch, gap = results.scratch_of(arm), results.gap(arm)
    if scratch is not None and gap is not None and math.isfinite(gap):
        comparisons.append(("equal training tokens", scratch, gap))
    total = arm.ledger.total.tokens or 0
    nearest = sorted(results.targets[arm.target], key=lambda other: abs((other.ledger.total.tokens or 0) - total))
    for other in nearest:
        advantage = _advantage_at_equal_total(arm, other)
        if advantage is not None:
            return [*comparisons, ("equal total tokens", other, advantage)]
    return comparisons


_OF_A_MACHINE = ("micro_batch_size", "checkpoints", "checkpoint_minutes", "mask_check_steps")
_OF_THE_ARM = ("tokens", "paper_steps", "learning_rate", "validations", "validation_samples")
"""Keys of ``train`` that an arm's tokens and rate stand for, or that only decide when it is measured."""
_OF_THE_RUN = ("layout", "arms", "learning_rate", "distill", "task_data")
"""Keys of a target that do not decide what is pruned."""


def _identity(results: Results, arm: ArmResult) -> str | None:
    """Return a hash that is equal for one arm in several runs, with any seeds; None if its recipe is not known.

    It covers the parent, the text, what was pruned and how, and the training: not the other arms of its recipe, nor
    their budgets, the layout or the evaluation.
    """
    target, train = at(results.recipe, "targets", arm.target), at(results.recipe, "train")
    if not isinstance(target, Mapping) or not isinstance(train, Mapping):
        return None
    rate: Any = target.get("learning_rate") or train.get("learning_rate")
    taught = any(charge.activity == "teacher" for charge in arm.ledger.charges)
    unlike = {*_OF_A_MACHINE, *_OF_THE_ARM, *([] if taught else ["distill"])}
    return identity_without_seeds(
        {
            "parent": results.hashes.get("parent weights") or results.recipe.get("parent"),
            "text": results.hashes.get("train tokens") or results.recipe.get("data"),
            "target": {key: value for key, value in target.items() if key not in _OF_THE_RUN},
            "initialisation": arm.initialisation,
            "rate": rate.get(arm.initialisation) if isinstance(rate, Mapping) else rate,
            "tokens": arm.ledger.training.tokens,
            "train": {key: value for key, value in train.items() if key not in unlike},
        },
        results.parent_origin,
    )


def _advantage_at_equal_total(pruned: ArmResult, scratch: ArmResult) -> float | None:
    """Return scratch loss minus pruned loss if both took as many tokens in total, with teachers; or else None."""
    total, seen = pruned.ledger.total.tokens, scratch.ledger.total.tokens
    losses = (scratch.validation_loss, pruned.validation_loss)
    if scratch.initialisation != "random" or not total or not seen or _unlike("", total, seen, _SLACK):
        return None
    if losses[0] is None or losses[1] is None or not math.isfinite(losses[0] - losses[1]):
        return None
    return losses[0] - losses[1]


def _own(
    question: Question,
    results: Results,
    pruned_from: ParentResult,
    arm: ArmResult,
    advantage: float,
    setting: EvidenceSetting,
    packaged: bool,
) -> Evidence:
    tokens = arm.ledger.training.tokens or arm.validation[-1].tokens
    parent = pruned_from.shape.parameters
    parameters = arm.shape.parameters - arm.masked_parameters
    pretraining = [charge.tokens or 0 for charge in arm.ledger.charges if charge.activity == "parent pretraining"]
    compared = setting == "equal total tokens" and bool(question.parent_tokens) and bool(pretraining)
    reasons = [
        _unlike("parameters", question.parameters, parameters),
        _unlike("training tokens", question.train_tokens, tokens),
        _unlike("parent tokens", question.parent_tokens or 0, sum(pretraining)) if compared else "",
        _unlike_ratio(question.ratio, 1 - parameters / parent),
    ]
    taught = any(charge.activity == "teacher" for charge in arm.ledger.charges)
    run = f"{results.title!r} ({results.recipe_name})"
    return Evidence(
        setting,
        f"nemo_pvs's own run {run}" if packaged else f"your run {run}",
        not packaged,
        False,
        granularity_of(arm, pruned_from),
        arm.method,
        advantage,
        "nats",
        f"{arm.name}: {written(parameters)} of {written(parent)} parameters, {written(tokens)} tokens"
        + (", with a teacher" if taught else ""),
        "; ".join(filter(None, reasons)),
    )


def published_evidence(question: Question, paper: Published) -> list[Evidence]:
    """Compare the paper's points; losses between two points are interpolated over the logarithm of tokens."""
    evidence = []
    curves = {(curve.method, curve.initialisation): curve for curve in paper.curves}
    for (method, initialisation), pruned in curves.items():
        if initialisation == "pruned":
            scratch = curves[method, "random"]
            evidence.append(_of_losses(question, paper, pruned, scratch, 0.0))
            if question.parent_tokens is not None:
                evidence.append(_of_losses(question, paper, pruned, scratch, question.parent_tokens))
    for advantage in paper.advantages:
        reasons = [
            _unlike("parameters", question.parameters, advantage.parameters),
            _unlike("training tokens", question.train_tokens, paper.accuracy_tokens),
            _unlike_ratio(question.ratio, advantage.ratio),
        ]
        evidence.append(
            Evidence(
                "equal training tokens",
                advantage.source,
                False,
                True,
                advantage.granularity,
                advantage.method,
                advantage.points,
                "points",
                f"{advantage.method} at ratio {advantage.ratio:g}, {written(paper.accuracy_tokens)} tokens each",
                "; ".join(filter(None, reasons)),
            )
        )
    if question.parent_tokens is None:
        return evidence
    for accuracy in paper.accuracies:
        reasons = [
            _unlike("parameters", question.parameters, paper.curves[0].parameters),
            _unlike("training tokens", question.train_tokens, paper.accuracy_tokens),
            _unlike("parent tokens", question.parent_tokens, paper.parent_tokens),
            _unlike_ratio(question.ratio, 0.5),
        ]
        evidence.append(
            Evidence(
                "equal total tokens",
                accuracy.source,
                False,
                True,
                accuracy.granularity,
                accuracy.method,
                accuracy.pruned - accuracy.random,
                "points",
                f"{accuracy.method} at ratio 0.5: average accuracy {accuracy.pruned} pruned (parent 200B, then 50B), "
                f"{accuracy.random} from scratch (250B)",
                "; ".join(filter(None, reasons)),
            )
        )
    return evidence


def _of_losses(
    question: Question, paper: Published, pruned: PublishedCurve, scratch: PublishedCurve, head_start: float
) -> Evidence:
    """Compare two published curves, with scratch trained on ``head_start`` more tokens."""
    reasons = [
        _unlike("parameters", question.parameters, pruned.parameters),
        _unlike_ratio(question.ratio, pruned.ratio),
    ]
    asked = (question.train_tokens, question.train_tokens + head_start)
    (pruned_tokens, pruned_loss), (scratch_tokens, scratch_loss) = map(_published_loss, (pruned, scratch), asked)
    if _unlike("", asked[0], pruned_tokens, _SLACK) or _unlike("", asked[1], scratch_tokens, _SLACK):
        first, last = pruned.points[0].tokens, pruned.points[-1].tokens
        seen = " and ".join(dict.fromkeys(map(written, asked)))
        reasons.append(f"{seen} tokens, compared with {written(first)} to {written(last)}")
    if head_start:
        reasons.append(_unlike("parent tokens", head_start, paper.parent_tokens))
    return Evidence(
        "equal total tokens" if head_start else "equal training tokens",
        pruned.source,
        False,
        True,
        pruned.granularity,
        pruned.method,
        scratch_loss - pruned_loss,
        "nats",
        f"{pruned.method} at ratio {pruned.ratio:g}: validation loss {pruned_loss:.2f} pruned after "
        f"{written(pruned_tokens)} tokens, {scratch_loss:.2f} from scratch after {written(scratch_tokens)}",
        "; ".join(filter(None, reasons)),
    )


def _published_loss(curve: PublishedCurve, tokens: float) -> tuple[float, float]:
    """Return tokens and loss of the point at ``tokens``, interpolated between two points, or of the nearest end."""
    seen = [float(point.tokens) for point in curve.points]
    losses = [point.loss for point in curve.points]
    for count, loss in zip(seen, losses, strict=True):
        if not _unlike("", tokens, count, _SLACK):
            return count, loss
    tokens = min(max(tokens, seen[0]), seen[-1])
    return tokens, float(np.interp(math.log(tokens), np.log(seen), losses))


def _unlike(what: str, asked: float, known: float, factor: float = _SIMILAR) -> str:
    if max(asked, known) <= factor * min(asked, known):
        return ""
    return f"{written(asked)} {what}, compared with {written(known)}"


def _unlike_ratio(asked: float, known: float) -> str:
    return "" if abs(asked - known) <= _SIMILAR_RATIO + 1e-9 else f"ratio {asked:.2f}, compared with {known:.2f}"


def written(count: float) -> str:
    """Format a count of parameters or tokens for people: 4.5B, 135M, 15T."""
    for size, letter in ((1e12, "T"), (BILLION, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
