"""Architecture search: which of the shapes within a budget loses least when the model is pruned to it (2407.14679)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.ledger.flops import sweep_tokens
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.search.latency import Latency
from nemo_pvs.pruning.structured.joint import plan_joint
from nemo_pvs.system import ranks
from nemo_pvs.system.files import read_json, sha256_json, write_json
from nemo_pvs.system.ranks import from_main

_AXES = ("layers", "hidden", "ffn", "kv_groups", "heads_per_group")
"""The sizes of a candidate that can be chosen independently of each other."""


@dataclass(frozen=True)
class Candidate:
    """One architecture and what is known about it."""

    shape: Shape
    flops_per_token: float
    """Forward FLOPs, as the search's ``flops_per_token`` counts them."""
    estimated_loss: float | None = None
    """What its sizes cost one by one, added up; None where every candidate was run anyway."""
    loss: float | None = None
    """Loss (nats per token) right after pruning; None where the shortlist left the candidate out."""
    retrained_loss: float | None = None
    """What ``retrain`` returned; None where it was not asked."""
    latency: Latency | None = None
    """Measured seconds; None where no latency was asked for."""

    @property
    def rank(self) -> tuple[float, ...]:
        """Key to sort by: retrained ones first, then measured ones, then by the estimate, the smaller of equals.

        A loss that is no number, as of a training that diverged, counts as none.
        """
        losses = (self.retrained_loss, self.loss, self.estimated_loss)
        ranked = (math.inf if loss is None or math.isnan(loss) else loss for loss in losses)
        return (*ranked, self.shape.parameters)


@dataclass(frozen=True)
class Ranking:
    """The outcome of a search."""

    candidates: tuple[Candidate, ...]
    """All of them, the best first; those that were not run come last, by ``estimated_loss``."""
    run: tuple[Shape, ...]
    """Every model whose loss was measured, also those that only served the estimates."""
    tokens: dict[str, Any]
    """Manifest of the token set."""

    @property
    def tokens_read(self) -> int:
        """Tokens that went through all models, retraining apart."""
        return sweep_tokens(self.tokens, len(self.run))

    @property
    def flops(self) -> int:
        """Forward FLOPs of all models that were run, retraining apart."""
        length = self.tokens["sequence_length"]
        per_token = sum(shape.flops_per_token(sequence_length=length, training=False) for shape in self.run)
        return int(self.tokens["samples"] * length * per_token)


def search(
    source: WeightSource,
    scores: Scores,
    tokens: TokenSet,
    shapes: Sequence[Shape],
    flops_per_token: Callable[[Shape], float],
    *,
    aggregation: str = "energy",
    layer_order: Sequence[int] | None = None,
    shortlist: int | None = 10,
    retrain: Callable[[Plan], float] | None = None,
    retrain_best: int = 3,
    retrained: str = "",
    state: Path | None = None,
    compute: Compute = ON_CPU,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Rank architectures by the loss right after pruning and, if wanted, after a short retraining.

    No model is held in memory: a candidate is the parent, sliced as its layers are read. Where there are many, a
    shortlist is run: the dense model and the parent with one size changed at a time (two values per size) say what
    each size costs, and the sum estimates the rest. Importance kept, which costs nothing, is no guide: a few channels
    of the residual stream have most of its energy, so it mistakes narrow models for good ones.

    Under ``torch.distributed`` the ranks share the text of every model; each calls ``retrain``.

    Args:
        source: The dense model.
        scores: What ``calibrate`` measured on it.
        tokens: Text to predict: the calibration tokens, or better a validation set.
        shapes: What ``grid.legal_shapes`` returned.
        flops_per_token: What a candidate costs to run, for the table: ``grid.flops_at(context)``.
        aggregation: As for ``plan_width``.
        layer_order: As for ``plan_joint``.
        shortlist: How many candidates are run, those of the lowest estimate; all if None.
        retrain: Trains what a plan keeps for a while and returns its loss. Minitron's ranking settles after about 300
            steps (2407.14679), and may differ from the one before.
        retrain_best: How many candidates are retrained, the best before.
        retrained: What distinguishes one way of retraining from another, for ``state``.
        state: A JSON file that each result is saved to; an interrupted search continues from it.
        compute: Where and how layers run.
        progress: Called with (layers run, in all), a candidate counting as many layers as the parent.

    Raises:
        UserError: the scores are of another model, or ``state`` belongs to another search.
    """
    scores.check_model(source)
    parent = scores.shape
    probes = _probes(parent, shapes)
    if shortlist is None or len(shapes) <= shortlist + len(probes):
        probes, shortlist = [], len(shapes)
    settings = {
        "scores": scores.content_hash,
        "tokens": tokens.manifest,
        "aggregation": aggregation,
        "layer_order": None if layer_order is None else list(layer_order),
        "dtype": str(compute.dtype),
    }
    known = _Known(state, settings, parent)
    total = (len(probes) + shortlist) * parent.layers
    run: list[Shape] = []

    def plan(shape: Shape) -> Plan:
        return plan_joint(scores, shape, aggregation, layer_order)

    def one_shot(shape: Shape) -> float:
        measured = perplexity(
            PrunedSource(source, plan(shape)),
            tokens,
            compute,
            # Text that does not fit takes several sweeps over the layers.
            progress=progress and (lambda done, of: progress((len(run) * of + done) * parent.layers // of, total)),
        )
        return float(measured["loss"])

    def loss_of(shape: Shape) -> float:
        loss = known.get("loss", shape, one_shot)
        run.append(shape)
        if progress:
            progress(len(run) * parent.layers, total)
        return loss

    candidates = [Candidate(shape, flops_per_token(shape)) for shape in shapes]
    if probes:
        estimate = _estimate(parent, {probe: loss_of(probe) for probe in probes})
        candidates = [replace(candidate, estimated_loss=estimate(candidate.shape)) for candidate in candidates]
        candidates.sort(key=lambda candidate: candidate.rank)
    chosen, rest = candidates[:shortlist], candidates[shortlist:]
    chosen = sorted(
        (replace(candidate, loss=loss_of(candidate.shape)) for candidate in chosen),
        key=lambda candidate: candidate.rank,
    )
    if retrain is not None:
        train = retrain
        for place, candidate in enumerate(chosen[:retrain_best]):
            loss = known.get(f"retrained_loss {retrained}".strip(), candidate.shape, lambda shape: train(plan(shape)))
            chosen[place] = replace(candidate, retrained_loss=loss)
        chosen.sort(key=lambda candidate: candidate.rank)
    return Ranking((*chosen, *rest), tuple(run), tokens.manifest)


def _probes(parent: Shape, shapes: Sequence[Shape]) -> list[Shape]:
    """Return the parent, and the parent with one size at the smallest or the middle of its values in ``shapes``."""
    probes = [parent]
    for name in _AXES:
        values = sorted({getattr(shape, name) for shape in shapes})
        for value in sorted({values[0], values[len(values) // 2]} - {getattr(parent, name)}):
            size = {"heads": value * parent.kv_groups} if name == "heads_per_group" else {name: value}
            probes.append(parent.replace(**size))
    return probes


def _estimate(parent: Shape, losses: Mapping[Shape, float]) -> Callable[[Shape], float]:
    """Return a function that adds up what each size of a shape costs alone, linear between the sizes that were run."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for name in _AXES:
        others = [size for size in _AXES if size != name]
        alone = sorted(
            (getattr(shape, name), loss - losses[parent])
            for shape, loss in losses.items()
            if all(getattr(shape, size) == getattr(parent, size) for size in others)
        )
        curves[name] = [size for size, _ in alone], [cost for _, cost in alone]

    def estimate(shape: Shape) -> float:
        costs = (np.interp(getattr(shape, name), sizes, costs) for name, (sizes, costs) in curves.items())
        return losses[parent] + float(sum(costs))

    return estimate


class _Known:
    """Results of a search by kind and shape, in a file if there is one."""

    def __init__(self, path: Path | None, settings: dict[str, Any], parent: Shape) -> None:
        self._path = path
        self._parent = parent
        self._values: dict[str, Any] = {"settings_sha256": sha256_json(settings), "settings": settings}
        found = from_main(lambda: read_json(path) if path is not None and path.exists() else None)
        if found is not None:
            if not isinstance(found, dict) or found.get("settings_sha256") != self._values["settings_sha256"]:
                raise UserError(
                    f"{path} belongs to a search with other scores, text or settings; remove it, or rename it."
                )
            self._values = found

    def get(self, kind: str, shape: Shape, measure: Callable[[Shape], float]) -> float:
        """Return a number that is known, or measure it and write it down."""
        results = self._values.setdefault(kind, {})
        names = ["layers", "hidden", "ffn", "kv_groups"]
        if shape.heads_per_group != self._parent.heads_per_group:
            names.append("heads")
        key = ",".join(f"{name}={getattr(shape, name)}" for name in names)
        if key not in results:
            results[key] = measure(shape)
            if self._path is not None and ranks.is_main():
                write_json(self._path, self._values)
        return float(results[key])
