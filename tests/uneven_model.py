"""A tiny random model whose layers all differ, in FFN width, query heads, KV groups and heads of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_pvs.model.hf_classes import model_class
from nemo_pvs.model.shape import LayerSizes
from tests.conftest import tiny_llama_config
from tests.families import LAYOUTS, tiny_config

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


def uneven_class(family: str = "llama") -> Any:
    """Return our class for uneven layers of a family."""
    architecture, model_type = LAYOUTS[family].uneven_class or ("", "")
    return model_class({"architectures": [architecture], "model_type": model_type})


def uneven_config(
    sizes: tuple[LayerSizes, ...] = SIZES, bounds: LayerSizes = BOUNDS, family: str = "llama", **overrides: Any
) -> Any:
    """Return the config of a tiny model with these layers."""
    settings = {"num_hidden_layers": len(sizes), **overrides}
    even = (tiny_llama_config(**settings) if family == "llama" else tiny_config(family, **settings)).to_dict()
    keys = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    layers = [dict(zip(keys, one, strict=True)) for one in sizes]
    ours = uneven_class(family)
    names = {"architectures": [ours.__name__], "model_type": ours.config_class.model_type, "layer_shapes": layers}
    return ours.config_class(**{**even, **dict(zip(keys, bounds, strict=True)), **names})


def uneven_model(seed: int = 0, std: float = 0.2, family: str = "llama", **overrides: Any) -> Any:
    """Return a random model whose layers matter; norms and biases are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = uneven_class(family)(uneven_config(family=family, **overrides)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=std)
    return model


def make_uneven(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save the model in ``folder`` and return ``folder``."""
    uneven_model(**overrides).to(dtype).save_pretrained(folder)
    return folder
