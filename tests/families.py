"""Tiny random models of every family in ``conversions/``: a new table needs an entry in ``CASES``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_pvs.model import layout
from nemo_pvs.model.layout import Layout, layouts
from tests.conftest import save_tiny_tokenizer

_SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden / heads, on purpose
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.03,
}
# Family, what it is about, and the settings that make it so.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "plain", {}),
    ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", "no window", {"sliding_window": None}),
    ("mistral", "window", {"sliding_window": 64, "tie_word_embeddings": True}),
    ("qwen2", "plain", {}),
    ("qwen2", "tied", {"tie_word_embeddings": True, "num_attention_heads": 6}),
    ("qwen3", "plain", {}),
    ("qwen3", "tied", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
]
LAYOUTS = {one.family: one for one in layouts()}


def model_class(family: Layout) -> Any:
    """Return the class of a family in ``transformers``."""
    return getattr(transformers, family.even_class[0])


def tiny_config(family: str, **settings: Any) -> Any:
    """Return the ``transformers`` config of a tiny model."""
    stock = model_class(LAYOUTS[family])
    return stock.config_class(**{**_SIZES, **settings}, architectures=[stock.__name__])


def tiny_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """Return a tiny model in which every weight, norm and bias is random and matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(LAYOUTS[family])(tiny_config(family, **settings)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.1)
                elif name.endswith("bias"):
                    parameter.uniform_(-0.5, 0.5)
                else:
                    parameter.uniform_(0.5, 1.5)
    return model


def without_uneven_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no table name classes for uneven layers, as that of a family which a user has added."""

    def stripped() -> tuple[Layout, ...]:
        tables = ({key: value for key, value in one.table.items() if key != "uneven"} for one in LAYOUTS.values())
        return tuple(Layout(table["family"], table) for table in tables)

    monkeypatch.setattr(layout, "layouts", stripped)


def save_tiny(folder: Path, family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Save a tiny model with a tokenizer in the Hugging Face format in ``folder`` and return ``folder``."""
    tiny_model(family, **settings).to(dtype).save_pretrained(folder)
    return save_tiny_tokenizer(folder)
