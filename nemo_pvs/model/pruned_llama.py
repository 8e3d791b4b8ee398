"""Llama with uneven layers for `transformers`: FFN width, query heads and KV groups may differ from layer to layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

_PER_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


class PrunedLlamaConfig(LlamaConfig):
    """A LlamaConfig with sizes for each layer.

    ``layer_shapes`` has one entry a layer: its intermediate_size, num_attention_heads and num_key_value_heads. The
    settings of these names are their common bounds, so that what sizes a buffer by them is on the safe side.
    """

    model_type = "pruned_llama"

    def __init__(self, layer_shapes: Sequence[Mapping[str, int]] | None = None, **settings: Any) -> None:
        """Take the settings of LlamaConfig, and ``layer_shapes``; without it the layers are even.

        Raises:
            ValueError: there are more or fewer entries than layers.
        """
        super().__init__(**settings)
        even = {name: getattr(self, name) for name in _PER_LAYER}
        self.layer_shapes = [dict(shape) for shape in layer_shapes or [even] * self.num_hidden_layers]
        if len(self.layer_shapes) != self.num_hidden_layers:
            raise ValueError(
                f"layer_shapes has {len(self.layer_shapes)} entries, but there are {self.num_hidden_layers} layers."
            )

    def at(self, layer: int) -> PrunedLlamaConfig:
        """Return a copy with the sizes of one layer (from 0) in place of the bounds."""
        config = copy.copy(self)
        for name in _PER_LAYER:
            setattr(config, name, self.layer_shapes[layer][name])
        return config


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """A LlamaForCausalLM whose layers have the sizes of ``PrunedLlamaConfig.layer_shapes``.

    Weights have the names of a stock Llama. Stock ``transformers`` refuses the folder, for it does not recognise the
    model type ``pruned_llama``; ``import nemo_pvs.modeling`` before ``from_pretrained`` is all that it takes. Without
    this package, write the model with ``--uneven pad``: a stock Llama that computes the same.
    """

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        """Build the model; ``from_pretrained`` does so without memory for the weights."""
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            layer = LlamaDecoderLayer(config.at(index), index)
            layer.self_attn.config = config  # asked once more for the attention implementation, set on the whole model
            self.model.layers[index] = layer
        self.post_init()
