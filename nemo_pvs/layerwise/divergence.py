"""How far a model's predictions are from another's, by position: the Kullback-Leibler divergence, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.layerwise.model import ON_CPU, Compute, LayerwiseModel
from nemo_pvs.system import ranks


class Bucket(NamedTuple):
    """A range of positions."""

    first: int
    """Position of its first token: the number of tokens that a model has read when it predicts, from 1."""
    last: int
    """Position of its last token."""


def buckets(length: int) -> list[Bucket]:
    """Return ranges that cover positions 1 to ``length``: 1 to 16, 17 to 64, 65 to 256, and so on by factors of 4."""
    ranges, end = [], 0
    while end < length:
        first, end = end + 1, min(4 * end or 16, length)
        ranges.append(Bucket(first, end))
    return ranges


class Reference:
    """A model with which others are compared; its hidden states for the last text are kept."""

    def __init__(self, source: WeightSource, compute: Compute = ON_CPU) -> None:
        """Prepare the model without reading weights."""
        self.model = LayerwiseModel(source, compute)
        self._ids = torch.empty(0)
        self._hidden = torch.empty(0)

    def states(self, ids: torch.Tensor, progress: Callable[[], None] = lambda: None) -> torch.Tensor:
        """Return the outputs [N, S, d] of the last decoder layer for token ids [N, S]; do not change them.

        Args:
            ids: The text.
            progress: Called after each layer.
        """
        if not torch.equal(self._ids, ids):
            self._hidden = torch.empty(0)  # before the next ones take their memory
            self._hidden, self._ids = _run(self.model, ids, progress), ids
        return self._hidden


def divergence(
    source: WeightSource,
    reference: Reference,
    ids: torch.Tensor,
    compute: Compute = ON_CPU,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return KL(reference || model) after every token, in nats: float64 [N, S], at least 0 up to rounding.

    Both models read the same tokens. A sum over the vocabulary is exact: no token is left out or sampled. Under
    ``torch.distributed`` the ranks share the windows, and every rank gets all results.

    Args:
        source: The model.
        reference: The reference, with the same vocabulary.
        ids: Token ids [N, S].
        compute: Where and how the model's layers run.
        progress: Called with (layers done, their total).

    Raises:
        UserError: the text does not fit a model, or there are fewer windows than ranks.
    """
    model = LayerwiseModel(source, compute)
    found = torch.zeros(ids.shape, dtype=torch.float64)
    mine = ranks.split(torch.arange(len(ids)))
    done, layers = 0, model.shape.layers + reference.model.shape.layers

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(chunks) * layers)

    chunks = max((list(one.chunks(ids[mine], states=2)) for one in (reference.model, model)), key=len)
    for rows, chunk in zip(mine.split(len(chunks[0])), chunks, strict=True):
        before = done
        expected = reference.states(chunk, advance)
        done = before + reference.model.shape.layers  # also if its states were known
        hidden = _run(model, chunk, advance)
        parts = zip(reference.model.logits(expected), model.logits(hidden), strict=True)
        values = torch.cat([_divergence(one, other) for one, other in parts])
        found[rows] = values.view(chunk.shape).cpu()
    return ranks.all_reduce(found)


def _run(model: LayerwiseModel, ids: torch.Tensor, progress: Callable[[], None]) -> torch.Tensor:
    hidden = model.embed(ids)
    for index in range(model.shape.layers):
        model.run_layer(model.layer(index), hidden, model.compute.batch_size)
        progress()
    return hidden


def _divergence(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(logits) || softmax(others)) of each row, float64 [n], for logits [n, V]."""
    expected, other = logits.log_softmax(-1), others.log_softmax(-1)
    return (expected.exp() * (expected - other)).sum(-1, dtype=torch.float64)
