"""Models with uneven layers for `transformers`: FFN width, query heads and KV groups may differ between layers.

``UnevenConfig`` and ``UnevenModel`` add sizes of each layer to a family's stock classes; every family that has such
classes names them in its table (``uneven`` in ``conversions/<family>.yaml``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_PER_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads")

ConfigT = TypeVar("ConfigT", bound="UnevenConfig")


class UnevenConfig:
    """A config with sizes for each layer, the first base of a class whose second is a family's stock config.

    ``layer_shapes`` has one entry per layer: its intermediate_size, num_attention_heads and num_key_value_heads. The
    config's own settings of these names are the layers' common bounds, so buffers sized by them are large enough.
    ``config.json`` names the class, and NeMo's checkpoints its namesake for NeMo in ``megatron.uneven``.
    """

    num_hidden_layers: int

    def __init__(self, layer_shapes: Sequence[Mapping[str, int]] | None = None, **settings: Any) -> None:
        """Accept the settings of the stock config and ``layer_shapes``; without the latter, layers are even.

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

    def at(self: ConfigT, layer: int) -> ConfigT:
        """Return a copy with the sizes of one layer (counted from 0) instead of the bounds."""
        config = copy.copy(self)
        for name in _PER_LAYER:
            setattr(config, name, self.layer_shapes[layer][name])
        return config


class UnevenModel:
    """A model whose layers have the sizes of its config's ``layer_shapes``; the first base, before a stock model.

    Weights have the names of the stock model. Stock ``transformers`` does not recognise the model type;
    ``import nemo_pvs.modeling`` before ``from_pretrained`` registers it. To use the model without this package, write
    it with ``--uneven pad``: a stock model that computes the same function.
    """

    model: Any

    def __init__(self, config: Any) -> None:
        """Build the model; ``from_pretrained`` does so without allocating the weights."""
        super().__init__(config)  # type: ignore[call-arg]
        layers = self.model.layers
        for index in range(config.num_hidden_layers):
            layers[index] = type(layers[index])(config.at(index), index)
            layers[index].self_attn.config = config  # has the attention implementation, set on the whole model
        self.post_init()  # type: ignore[attr-defined]


# Transformers 5 would generate an __init__ for a config class that does not define one.


class PrunedLlamaConfig(UnevenConfig, LlamaConfig):
    """A LlamaConfig with uneven layers."""

    model_type = "pruned_llama"
    __init__ = UnevenConfig.__init__


class PrunedMistralConfig(UnevenConfig, MistralConfig):
    """A MistralConfig with uneven layers."""

    model_type = "pruned_mistral"
    __init__ = UnevenConfig.__init__


class PrunedQwen2Config(UnevenConfig, Qwen2Config):
    """A Qwen2Config with uneven layers."""

    model_type = "pruned_qwen2"
    __init__ = UnevenConfig.__init__


class PrunedQwen3Config(UnevenConfig, Qwen3Config):
    """A Qwen3Config with uneven layers."""

    model_type = "pruned_qwen3"
    __init__ = UnevenConfig.__init__


# The stock models declare ``generation_config`` twice, with different types.


class PrunedLlamaForCausalLM(UnevenModel, LlamaForCausalLM):  # type: ignore[misc]
    """A LlamaForCausalLM with uneven layers."""

    config_class = PrunedLlamaConfig


class PrunedMistralForCausalLM(UnevenModel, MistralForCausalLM):  # type: ignore[misc]
    """A MistralForCausalLM with uneven layers."""

    config_class = PrunedMistralConfig


class PrunedQwen2ForCausalLM(UnevenModel, Qwen2ForCausalLM):  # type: ignore[misc]
    """A Qwen2ForCausalLM with uneven layers."""

    config_class = PrunedQwen2Config


class PrunedQwen3ForCausalLM(UnevenModel, Qwen3ForCausalLM):  # type: ignore[misc]
    """A Qwen3ForCausalLM with uneven layers."""

    config_class = PrunedQwen3Config
