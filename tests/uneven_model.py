"""A tiny random Llama whose layers all differ, in FFN width, query heads, KV groups and heads of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_pvs.model.hf_classes import PrunedLlamaConfig, PrunedLlamaForCausalLM
from nemo_pvs.model.shape import LayerSizes
from tests.conftest import tiny_llama_config

SIZES = (LayerSizes(96, 8, 2), LayerSizes(40, 2, 2), LayerSizes(64, 8, 4), LayerSizes(128, 12, 6))
"""Tensor parallelism 2 and pipeline parallelism 2 divide them."""
BOUNDS = LayerSizes(ffn=128, heads=24, kv_groups=6)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}
BIASES = {"attention_bias": True, "mlp_bias": True}


def uneven_config(sizes: tuple[LayerSizes, ...] = SIZES, bounds: LayerSizes = BOUNDS, **overrides: Any) -> Any:
    """Return the config of a tiny model with these layers."""
    even = tiny_llama_config(num_hidden_layers=len(sizes), **overrides).to_dict()
    keys = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    layers = [dict(zip(keys, one, strict=True)) for one in sizes]
    names = {"architectures": ["PrunedLlamaForCausalLM"], "model_type": "pruned_llama", "layer_shapes": layers}
    return PrunedLlamaConfig(**{**even, **dict(zip(keys, bounds, strict=True)), **names})


def uneven_model(seed: int = 0, std: float = 0.2, **overrides: Any) -> PrunedLlamaForCausalLM:
    """Return a random model whose layers matter; norms and biases are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PrunedLlamaForCausalLM(uneven_config(**overrides)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=std)
    return model


def make_uneven_llama(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save the model in ``folder`` and return ``folder``."""
    uneven_model(**overrides).to(dtype).save_pretrained(folder)
    return folder
