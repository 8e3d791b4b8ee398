"""Losses of a model without some of its layers: one pass for many candidates, which share the layers before those."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import ON_CPU, Compute, LayerwiseModel
from nemo_pvs.system import ranks


class LayerSweep:
    """Measures losses of one model on one text; each call of ``losses`` sweeps from the first layer to the last.

    With several ranks (``torch.distributed``) each reads its share of the text, and all get the losses on the whole.

    A candidate omits a run of consecutive layers. It shares the whole model's states up to its run, skips the run, and
    then advances with all others: every layer is loaded once for all candidates, and their losses cost about half as
    much as running them one by one.
    """

    def __init__(
        self,
        source: WeightSource,
        tokens: TokenSet,
        compute: Compute = ON_CPU,
        *,
        on_forward: Callable[[float], None] | None = None,
    ) -> None:
        """Prepare without computing anything.

        Args:
            source: The dense model.
            tokens: Text to predict.
            compute: Where and how layers run; there is a copy of the hidden states per candidate.
            on_forward: Called with ``layer_forwards`` after each layer forward.
        """
        self.model = LayerwiseModel(source, compute)
        self.layer_forwards = 0.0
        """Passes of this rank's text through a decoder layer so far; a part of the text counts as a fraction."""
        self._ids = ranks.split(tokens.ids)
        self._batch_size = compute.batch_size
        self._on_forward = on_forward

    def losses(
        self, layers: Sequence[int], width: int, starts: Iterable[int], *, whole: bool = True
    ) -> tuple[dict[int, float], float | None]:
        """Measure the loss without each of several runs of layers.

        Args:
            layers: Indices of the model's remaining layers, in order.
            width: Consecutive elements of ``layers`` that a candidate omits.
            starts: For each candidate, the position in ``layers`` of the first layer that it omits.
            whole: Also measure the model of all ``layers``.

        Returns:
            The loss (nats per token) of each candidate by its start, and the loss of all ``layers``, or None.

        Raises:
            UserError: a loss is not finite.
        """
        wanted = sorted(starts)
        totals = dict.fromkeys((*wanted, None) if whole else wanted, 0.0)
        predicted = 0
        for ids in self.model.chunks(self._ids, states=len(wanted) + 1):
            share = len(ids) / len(self._ids)
            last = self._run(ids, layers, width, wanted, whole, share)
            for start in totals:
                loss, count = self.model.losses(last.pop(start), ids[:, 1:])  # frees them for the next part
                totals[start] += loss
            predicted += count
        sums = ranks.all_reduce(torch.tensor([*totals.values(), predicted], dtype=torch.float64)).tolist()
        means = {start: total / sums[-1] for start, total in zip(totals, sums, strict=False)}
        if not all(map(math.isfinite, means.values())):
            raise UserError("The model's loss is not finite during the depth scan; is the checkpoint damaged?")
        dense = means.pop(None, None)
        return {start: loss for start, loss in means.items() if start is not None}, dense

    def _run(
        self, ids: torch.Tensor, layers: Sequence[int], width: int, starts: list[int], whole: bool, share: float
    ) -> dict[int | None, torch.Tensor]:
        """Return the last hidden states of every candidate by its start, and under None those of the whole model."""
        dense = self.model.embed(ids[:, :-1])
        pruned: dict[int | None, torch.Tensor] = {}
        for position, index in enumerate(layers):
            if position in starts:
                pruned[position] = self.model.memory.copy(dense)
            moving = [states for start, states in pruned.items() if start is not None and position >= start + width]
            if whole or position < starts[-1]:
                moving.append(dense)
            if moving:
                self._advance(self.model.layer(index), moving, share)
        return {**pruned, None: dense} if whole else pruned

    def _advance(self, layer: nn.Module, moving: list[torch.Tensor], share: float) -> None:
        for states in moving:
            self.model.run_layer(layer, states, self._batch_size)
            self.layer_forwards += share
            if self._on_forward:
                self._on_forward(self.layer_forwards)
