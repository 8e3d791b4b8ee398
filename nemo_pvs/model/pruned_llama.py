"""Llama with uneven layers for `transformers`: FFN width, query heads and KV groups may differ between layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

_PER_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


class PrunedLlamaConfig(LlamaConfig):
    """A LlamaConfig with sizes for each layer.

    ``layer_shapes`` has one entry per layer: its intermediate_size, num_attention_heads and num_key_value_heads. The
    config's own settings of these names are the layers' common bounds, so buffers sized by them are large enough.
    ``config.json`` names this class, and NeMo's checkpoints its namesake for NeMo in ``megatron.uneven``.
    """

    model_type = "pruned_llama"

    def __init__(self, layer_shapes: Sequence[Mapping[str, int]] | None = None, **settings: Any) -> None:
        """Accept the settings of LlamaConfig and ``layer_shapes``; without the latter, layers are even.

        Raises:
            ValueError: the number of entries is not the number of layers.
        """
        heads = settings.get("num_attention_heads")
        if heads and settings.get("head_dim") and settings.get("num_key_value_heads"):
            # Transformers 5 would refuse a number of heads, here a bound, that does not divide the hidden size.
            super().__init__(**{**settings, "num_attention_heads": 1})
            self.num_attention_heads = heads
        else:
            super().__init__(**settings)
        even = {name: getattr(self, name) for name in _PER_LAYER}
        self.layer_shapes = [dict(shape) for shape in layer_shapes or [even] * self.num_hidden_layers]
        if len(self.layer_shapes) != self.num_hidden_layers:
            raise ValueError(
                f"layer_shapes has {len(self.layer_shapes)} entries, but there are {self.num_hidden_layers} layers."
            )

    def at(self, layer: int) -> PrunedLlamaConfig:
        """Return a copy with the sizes of one layer (counted from 0) instead of the bounds."""
        config = copy.copy(self)
        for name in _PER_LAYER:
            setattr(config, name, self.layer_shapes[layer][name])
        return config


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """A LlamaForCausalLM whose layers have the sizes of ``PrunedLlamaConfig.layer_shapes``.

    Weights have the names of a stock Llama. Stock ``transformers`` does not recognise the model type
    ``pruned_llama``; ``import nemo_pvs.modeling`` before ``from_pretrained`` registers it. To use the model without
    this package, write it with ``--uneven pad``: a stock Llama that computes the same function.
    """

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        """Build the model; ``from_pretrained`` does so without allocating the weights."""
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            layer = LlamaDecoderLayer(config.at(index), index)
            layer.self_attn.config = config  # has the attention implementation, which is set on the whole model
            self.model.layers[index] = layer
        self.post_init()
