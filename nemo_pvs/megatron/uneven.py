"""NeMo's configs of models with uneven layers: FFN width, query heads and KV groups may differ between layers.

A checkpoint of such a model names one of these classes in its ``context/io.json``, so ``io.load_context`` of stock
NeMo reads it where this package is installed. For NeMo without it, pad the model (``checkpoints/transforms/pad.py``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields

from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig
from nemo.collections.llm.gpt.model.mistral import MistralConfig7B
from nemo.collections.llm.gpt.model.qwen2 import Qwen2Config
from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config


@dataclass
class UnevenLayers:
    """Sizes of each layer, in order; the config's usual sizes are the maxima over all layers.

    If ``heterogeneous_block_specs`` is set, Megatron asks the config for the config of each layer and stores each
    layer under its own name. Megatron's own class for this does not support different numbers of query heads.
    """

    ffn_hidden_size_by_layer: list[int] = field(default_factory=list)
    num_attention_heads_by_layer: list[int] = field(default_factory=list)
    num_query_groups_by_layer: list[int] = field(default_factory=list)

    def __post_init__(self):
        """Raise ValueError unless every layer has each size."""
        super().__post_init__()
        self.heterogeneous_block_specs = True
        for name, sizes in self._by_layer().items():
            if len(sizes) != self.num_layers:
                raise ValueError(f"{name}_by_layer has {len(sizes)} entries for {self.num_layers} layers.")

    def get_config_for_layer(self, layer_number: int):
        """Return the config of one layer, counted from 1 over all pipeline stages."""
        config = copy.copy(self)
        for name, sizes in self._by_layer().items():
            setattr(config, name, sizes[layer_number - 1])
        return config

    def _by_layer(self) -> dict[str, list[int]]:
        return {item.name.removesuffix("_by_layer"): getattr(self, item.name) for item in fields(UnevenLayers)}


@dataclass
class PrunedLlamaConfig(UnevenLayers, LlamaConfig):
    """NeMo's LlamaConfig with uneven layers; checkpoints name it, so it keeps the name of that for Transformers."""


@dataclass
class PrunedLlama31Config(UnevenLayers, Llama31Config):
    """Llama31Config, which scales rotary frequencies, with uneven layers."""


@dataclass
class PrunedMistralConfig7B(UnevenLayers, MistralConfig7B):
    """NeMo's config of every Mistral, with uneven layers."""


@dataclass
class PrunedQwen2Config(UnevenLayers, Qwen2Config):
    """NeMo's Qwen2Config with uneven layers; it shares its name with the class for Transformers."""


@dataclass
class PrunedQwen3Config(UnevenLayers, Qwen3Config):
    """NeMo's Qwen3Config with uneven layers; it shares its name with the class for Transformers."""
