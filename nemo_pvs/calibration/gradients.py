"""Gradients of the language-model loss, layer by layer: forward through all layers, then backward one layer at a time.

Without an optimizer or a graph of the whole model, memory is one layer, two gradients of its matrices, and hidden
states. If the states before every layer do not fit, some are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nemo_pvs.calibration.taylor import Matrix, unit_scores
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import IGNORED, LayerwiseModel
from nemo_pvs.model.layout import Layout, TensorPart
from nemo_pvs.model.shape import Shape
from nemo_pvs.system import ranks


def taylor_scores(
    model: LayerwiseModel,
    tokens: TokenSet,
    *,
    batch_size: int = 8,
    progress: Callable[[], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the Taylor importance of every KV group, query head and FFN channel of a model with even layers.

    The loss is the mean cross entropy of each sequence's next tokens, over all sequences. With several ranks each
    reads its share of the sequences; gradients are summed before absolute values are taken, so the scores are those
    of one rank up to the order of summation.

    Args:
        model: The dense model; its dtype is that of the layers, gradients are at least fp32.
        tokens: The calibration text.
        batch_size: Sequences per batch; affects speed and memory, not the scores.
        progress: Called after each layer of the backward pass.

    Returns:
        ``groups.<metric>`` [L, G], ``heads.<metric>`` [L, H] and ``ffn.<metric>`` [L, f] for each of
        ``taylor.METRICS``, float64.

    Raises:
        UserError: hidden states exceed the model's memory limit, the tokens do not fit the model, or gradients are not
            finite.
    """
    layers, _ = layer_taylor_scores(model, tokens, batch_size=batch_size, progress=progress)
    return {name: torch.stack([scores[name] for scores in layers]) for name in layers[0]}


def layer_taylor_scores(
    model: LayerwiseModel,
    tokens: TokenSet,
    *,
    batch_size: int = 8,
    progress: Callable[[], None] | None = None,
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Return Taylor importance layer by layer, of a model with even or uneven layers, and each layer's similarity.

    Args:
        model: The dense model; its dtype is that of the layers, gradients are at least fp32.
        tokens: The calibration text.
        batch_size: Sequences per batch; affects speed and memory, not the scores.
        progress: Called after each layer of the backward pass.

    Returns:
        For each layer ``groups.<metric>`` [its G], ``heads.<metric>`` [its H] and ``ffn.<metric>`` [its f], float64;
        and the mean over all tokens of the cosine between each layer's inputs and outputs, float64 [L].

    Raises:
        UserError: hidden states exceed the model's memory limit, the tokens do not fit the model, or gradients are not
            finite.
    """
    room = _room(model, tokens)
    backward = _Backward(model, tokens, batch_size, progress or (lambda: None))
    backward.run(room)
    layers = range(model.shape.layers)
    similarity = torch.stack([backward.similarity[index].cpu() for index in layers])
    return [backward.scores[index] for index in layers], ranks.all_reduce(similarity).div_(tokens.ids.numel())


def _room(model: LayerwiseModel, tokens: TokenSet) -> int:
    """Return how many copies of the hidden states may be stored, in addition to those in use.

    The number is that of the rank with the most sequences, so that all ranks fail or continue together.

    Raises:
        UserError: the memory limit is too low.
    """
    samples, length = tokens.ids.shape
    copy = -(-samples // ranks.world_size()) * length * model.shape.hidden * model.dtype.itemsize
    # Two copies are in use: the states that pass through the layers, and their gradient.
    limit = ranks.from_main(lambda: model.memory.limit)  # which may have been measured
    needed, available = _levels(model.shape.layers) + 2, limit // copy
    if available < needed:
        raise UserError(
            f"Gradients of {samples} sequences of {length} tokens need {needed * copy / 1e9:.2g} GB of hidden states, "
            f"but {limit / 1e9:.2g} GB are allowed; use fewer samples, or "
            "allow more with pvs calibrate --activation-memory."
        )
    return available - 2


def _levels(layers: int) -> int:
    """Return how often ``layers`` layers can be halved, rounded up: the fewest stored copies for a backward pass."""
    return (layers - 1).bit_length()


class _Backward:
    """One backward pass through a model, for one rank's text."""

    def __init__(self, model: LayerwiseModel, tokens: TokenSet, batch_size: int, progress: Callable[[], None]) -> None:
        self.scores: dict[int, dict[str, torch.Tensor]] = {}
        self.similarity: dict[int, torch.Tensor] = {}
        """For each layer the sum over this rank's tokens of the cosine between inputs and outputs."""
        self._model = model
        self._samples = len(tokens.ids)
        self._ids = ranks.split(tokens.ids)
        self._batch_size = batch_size
        self._progress = progress
        self._gradient = torch.empty(0)
        """Gradient of each sequence's loss with respect to the outputs of the next layer to go through [n, S, d]."""

    def run(self, room: int) -> None:
        self._back(0, self._model.shape.layers, self._model.embed(self._ids), room)

    def _back(self, first: int, end: int, states: torch.Tensor, room: int) -> None:
        """Run the backward pass through the layers ``first`` to ``end - 1``.

        The layers are split into parts. A forward pass stores the states before each part, and the parts are then
        processed recursively from the last to the first, until a part is one layer.

        Args:
            first: The first layer.
            end: The layer after the last.
            states: Hidden states before the first layer [n, S, d]; overwritten.
            room: Copies of the states that may be stored in addition.
        """
        if end - first == 1:
            self._back_through_layer(first, states)
            return
        parts = _parts(end - first, room)
        bounds = [first + (end - first) * part // parts for part in range(parts + 1)]
        kept = [states]
        for start, stop in pairwise(bounds[:-1]):
            kept.append(self._forward(start, stop, self._model.memory.copy(kept[-1])))
        for part in reversed(range(parts)):
            self._back(bounds[part], bounds[part + 1], kept.pop(), room - part)

    def _forward(self, first: int, end: int, states: torch.Tensor) -> torch.Tensor:
        for index in range(first, end):
            self._model.run_layer(self._model.layer(index), states, self._batch_size)
        return states

    def _back_through_layer(self, index: int, states: torch.Tensor) -> None:
        layer = self._model.layer(index)
        if index == self._model.shape.layers - 1:
            self._gradient = self._model.run_layer(layer, self._model.memory.copy(states), self._batch_size)
            self._model.replace_by_loss_gradient(self._gradient, next_tokens(self._ids))
            self._gradient /= self._ids.shape[1] - 1
            self._model.drop_head()
        gradients = []
        for part in matrices(Layout.for_config(self._model.source.config), self._model.shape, index):
            gradients.append(_MatrixGradient(part.axes, layer.get_submodule(_module_name(part))))
        self.similarity[index] = torch.zeros((), dtype=torch.float64)
        layer.register_forward_hook(partial(self._add_similarity, index))
        self._model.back_through_layer(layer, states, self._gradient, self._batch_size)
        sums = (gradient.matrix(self._samples, f"layer {index}") for gradient in gradients)
        shape = self._model.shape.at(index)
        self.scores[index] = unit_scores(sums, shape.kv_groups, shape.heads)
        self._progress()

    def _add_similarity(
        self, index: int, _: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor
    ) -> None:
        wide = torch.promote_types(outputs.dtype, torch.float32)
        cosines = functional.cosine_similarity(inputs[0].detach().to(wide), outputs.detach().to(wide), dim=-1)
        self.similarity[index] = self.similarity[index].to(cosines.device) + cosines.sum(dtype=torch.float64)


class _MatrixGradient:
    """Sums a linear module's gradients over sequences, from its inputs and the gradients of its outputs."""

    def __init__(self, axes: tuple[str, ...], linear: Any) -> None:
        self._axes = axes
        self._weight = linear.weight.detach()
        self._dtype = torch.promote_types(self._weight.dtype, torch.float32)
        self._total = torch.zeros_like(self._weight, dtype=self._dtype)
        self._squares = torch.zeros_like(self._total)
        linear.register_forward_hook(self._watch)

    def _watch(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
        if outputs.requires_grad:
            outputs.register_hook(partial(self._update, inputs[0].detach()))

    def _update(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add a batch: inputs [n, S, in], and gradients of the loss with respect to the outputs [n, S, out]."""
        for x, y in zip(inputs.to(self._dtype), gradients.to(self._dtype), strict=True):
            gradient = y.T @ x
            self._total += gradient
            self._squares.addcmul_(gradient, gradient)

    def matrix(self, samples: int, where: str) -> Matrix:
        """Return the means over the sequences of all ranks.

        Raises:
            UserError: a gradient is not finite.
        """
        gradient, square = (ranks.all_reduce(tensor.cpu()).div_(samples) for tensor in (self._total, self._squares))
        if not bool(square.isfinite().all()):
            raise UserError(f"The gradients of {where} are not finite; is the checkpoint damaged?")
        device = self._weight.device
        return Matrix(self._axes, self._weight.to(self._dtype), gradient.to(device), square.to(device))


def matrices(layout: Layout, shape: Shape, layer: int) -> list[TensorPart]:
    """Return a decoder layer's matrices."""
    parts = (part for part, _ in layout.parts(shape).values())
    return [part for part in parts if part.layer == layer and len(part.axes) == 2]


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Return the token that follows each of ``ids`` [n, S]; the last has none and gets ``IGNORED``."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)


def _module_name(part: TensorPart) -> str:
    return part.name.removeprefix(f"model.layers.{part.layer}.").removesuffix(".weight")


def _parts(layers: int, room: int) -> int:
    """Return the largest number of parts to split layers into that leaves room to split the last part further.

    All other parts have more room: by then the states before later parts are freed.
    """
    return max(
        parts for parts in range(2, layers + 1) if parts == 2 or parts - 1 + _levels(-(-layers // parts)) <= room
    )
