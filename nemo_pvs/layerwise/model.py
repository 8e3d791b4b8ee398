"""Run a model one decoder layer at a time, straight from its checkpoint.

Memory is one layer, the hidden states and, at the end, the output head: never the whole model. The layers are those of
``transformers``, so every variant of rotary scaling is supported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.linear import linear, use_fast_linear
from nemo_pvs.layerwise.state_memory import StateMemory
from nemo_pvs.layerwise.token_scores import tokens_at_once
from nemo_pvs.layerwise.transfers import Transfers
from nemo_pvs.model.hf_classes import model_class
from nemo_pvs.model.layout import Layout

IGNORED = -100
"""A target whose loss is not counted."""


@dataclass(frozen=True)
class Compute:
    """Where and how layers run, one at a time."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """Of layers and hidden states; weights are cast to it as they are read."""
    memory_limit: int | None = None
    """Bytes that hidden states may take; text that exceeds it is read in several sweeps over the layers. None is 8 GiB
    on the CPU; with a GPU, what there is room for in its memory and in page-locked memory of the host."""
    batch_size: int = 8
    """Sequences per batch; affects speed and memory, and results only by rounding."""


ON_CPU = Compute()
"""In fp32 on the CPU, the default everywhere."""


class LayerwiseModel:
    """A causal language model whose weights stay in the checkpoint until they are needed.

    Hidden states stay on the device while they fit there, otherwise on the host, from where batches are moved to the
    device and back while it computes.
    """

    def __init__(self, source: WeightSource, compute: Compute = ON_CPU) -> None:
        """Prepare the model without reading weights."""
        self.source = source
        self.shape = shape_of(source)
        self.compute = compute
        self.dtype = compute.dtype
        self.device = torch.empty(0, device=compute.device).device  # with its number
        self.memory = StateMemory(self.device, compute.memory_limit)
        self.transfers = Transfers(self.device)
        self._skeleton = _skeleton(source.config)
        self._rotary = type(self._skeleton.model.rotary_emb)(config=self._skeleton.config).to(self.device)
        self._layer_names: dict[int, list[str]] = {layer: [] for layer in range(self.shape.layers)}
        for name, (_, entry) in Layout.for_config(source.config).parts(self.shape).items():
            if entry.layer is not None:
                self._layer_names[entry.layer].append(name)

    def chunks(self, ids: torch.Tensor, states: int = 1) -> Iterator[torch.Tensor]:
        """Split token ids [N, S] along N so that ``states`` copies of a chunk's hidden states fit in memory."""
        bytes_per_sequence = states * ids.shape[1] * self.shape.hidden * self.dtype.itemsize
        yield from ids.split(max(1, self.memory.limit // bytes_per_sequence))

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Return the hidden states [N, S, d] before the first layer, for token ids [N, S].

        Raises:
            UserError: the sequences are longer than the model's context, or an id is not in its vocabulary.
        """
        check_length(self._skeleton.config, ids.shape[1])
        if int(ids.min()) < 0 or int(ids.max()) >= self.shape.vocab:
            raise UserError(
                f"Token ids range from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has "
                f"{self.shape.vocab} entries; tokenise the text with this model's tokenizer."
            )
        table = self.source.read("model.embed_tokens.weight").to(self.device)
        states = self.memory.empty((*ids.shape, self.shape.hidden), self.dtype)
        for text, place in zip(ids.split(batch_size), states.split(batch_size), strict=True):
            embedded = functional.embedding(text.to(self.device).long(), table)
            self.transfers.store(embedded.to(self.dtype), place)
        self.transfers.finish()
        return states

    def layer(self, index: int) -> nn.Module:
        """Load decoder layer ``index`` (from 0), ready for ``run_layer``; drop it to free its weights."""
        layer = copy.deepcopy(self._skeleton.model.layers[index])
        prefix = f"model.layers.{index}."
        weights = {name.removeprefix(prefix): self._read(name) for name in self._layer_names[index]}
        layer.load_state_dict(weights, assign=True)
        return layer

    @torch.no_grad()
    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Replace hidden states [N, S, d] by the layer's outputs, in place, and return them.

        Attention is causal; sequences carry no padding, so there is no mask tensor.
        """
        rotary = self.positions(hidden)
        places = hidden.split(batch_size)
        for batch, place in zip(self.transfers.batches(hidden, batch_size), places, strict=True):
            self.transfers.store(layer(batch, position_embeddings=rotary), place)
        return hidden

    def back_through_layer(
        self, layer: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor, batch_size: int = 8
    ) -> torch.Tensor:
        """Replace gradients with respect to a layer's outputs by those with respect to its inputs, and return them.

        No gradients are accumulated in the layer's parameters.

        Args:
            layer: A layer that ``layer`` returned.
            hidden: The layer's inputs [N, S, d], on which its forward pass runs again.
            gradient: Gradient of any loss with respect to the layer's outputs [N, S, d]; replaced in place.
            batch_size: Sequences per batch.
        """
        rotary = self.positions(hidden)
        batches = (self.transfers.batches(states, batch_size) for states in (hidden, gradient))
        for batch, after, place in zip(*batches, gradient.split(batch_size), strict=True):
            with torch.enable_grad():
                inputs = batch.clone().requires_grad_()
                outputs = layer(inputs, position_embeddings=rotary)
                self.transfers.store(torch.autograd.grad(outputs, inputs, after)[0], place)
        return gradient

    @torch.no_grad()
    def positions(self, hidden: torch.Tensor) -> Any:
        """Return the cosines and sines of rotary positions, shared by all layers, for states [N, S, d]."""
        positions = torch.arange(hidden.shape[1], device=self.device)[None]
        return self._rotary(hidden.new_empty(0, device=self.device), positions)

    @torch.no_grad()
    def losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
        """Return the summed cross entropy (nats, accumulated in float64) and the number of predicted tokens.

        Args:
            hidden: Outputs of the last decoder layer [N, S, d].
            targets: Token ids [N, S]: the token that follows each position.
        """
        total = 0.0
        ids = targets.flatten()
        for logits in self.logits(hidden):
            chunk, ids = ids[: len(logits)], ids[len(logits) :]
            loss = functional.cross_entropy(logits, chunk.to(self.device).long(), reduction="none")
            total += float(loss.double().sum())
        return total, targets.numel()

    def replace_by_loss_gradient(self, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        """Replace hidden states in place by the gradient of the summed cross entropy with respect to them.

        Args:
            hidden: Outputs of the last decoder layer [N, S, d].
            targets: Token ids [N, S]: the token that follows each position, or ``IGNORED``.
        """
        norm, head = self._head
        size = tokens_at_once(self.shape.vocab, self.device)
        tokens = hidden.flatten(0, 1)
        for states, ids, place in zip(
            self.transfers.batches(tokens, size), targets.flatten().split(size), tokens.split(size), strict=True
        ):
            with torch.enable_grad():
                inputs = states.clone().requires_grad_()
                logits = functional.linear(norm(inputs), head)
                wide = logits.to(torch.promote_types(self.dtype, torch.float32))
                loss = functional.cross_entropy(
                    wide, ids.to(self.device).long(), ignore_index=IGNORED, reduction="sum"
                )
                self.transfers.store(torch.autograd.grad(loss, inputs)[0], place)

    def drop_head(self) -> None:
        """Free the output matrix; it is read again when needed."""
        self.__dict__.pop("_head", None)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the fp32 logits [n, V] of the tokens in order, a bounded number of tokens at a time.

        Args:
            hidden: Outputs of the last decoder layer [N, S, d].
        """
        norm, head = self._head
        size = tokens_at_once(self.shape.vocab, self.device)
        for states in self.transfers.batches(hidden.flatten(0, 1), size):
            yield linear(norm(states), head).float()

    @cached_property
    def _head(self) -> tuple[nn.Module, torch.Tensor]:
        """The final norm and the output matrix [V, d], cached."""
        norm = copy.deepcopy(self._skeleton.model.norm)
        norm.load_state_dict({"weight": self._read("model.norm.weight")}, assign=True)
        return norm, self._read("model.embed_tokens.weight" if self.shape.tied else "lm_head.weight")

    def _read(self, name: str) -> torch.Tensor:
        return self.source.read(name).to(self.device, self.dtype)


def check_length(config: Any, length: int) -> None:
    """Check that a model reads sequences of ``length`` tokens.

    Args:
        config: Its config, of ``transformers``.
        length: Number of tokens.

    Raises:
        UserError: they do not fit its context, or its attention window: layers run without a mask.
    """
    for limit in ("max_position_embeddings", "sliding_window"):
        context = getattr(config, limit, None)
        if context is not None and length > context:
            raise UserError(
                f"Sequences of {length} tokens do not fit the model's context of {context} "
                f"({limit}); choose a shorter sequence_length."
            )


def _skeleton(config: Mapping[str, Any]) -> Any:
    """Build the model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        class_ = model_class(config)
        model_config = class_.config_class.from_dict(dict(config))
        model = class_._from_config(model_config, attn_implementation="sdpa").eval()
    use_fast_linear(model)
    return model
