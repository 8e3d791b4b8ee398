"""What NeMo's Llama config classes leave unsaid: a checkpoint stores only the fields that differ from its class.

Read from nemo/collections/llm/gpt/model/llama.py of NeMo 2.7.3; a test compares every value with the installed NeMo.
"""

from __future__ import annotations

from typing import Any

MODULE = "nemo.collections.llm.gpt.model.llama"
PLAIN = "LlamaConfig"
SCALED = "Llama31Config"
"""The class whose rotary embedding is scaled the way Hugging Face calls ``llama3``."""

# Each class: the one that it extends, and the fields that it sets.
_CLASSES: dict[str, tuple[str | None, dict[str, Any]]] = {
    PLAIN: (
        None,
        {
            "seq_length": 4096,
            "layernorm_epsilon": 1e-5,
            "rotary_base": 10000,
            "init_method_std": 0.02,
            "share_embeddings_and_output_weights": False,
            "num_query_groups": None,
            "kv_channels": None,
            "vocab_size": None,
        },
    ),
    "Llama2Config7B": (
        PLAIN,
        {
            "num_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_query_groups": 32,
            "ffn_hidden_size": 11008,
        },
    ),
    "Llama2Config13B": (
        PLAIN,
        {
            "num_layers": 40,
            "hidden_size": 5120,
            "num_attention_heads": 40,
            "num_query_groups": 40,
            "ffn_hidden_size": 13824,
        },
    ),
    "Llama2Config70B": (
        PLAIN,
        {
            "num_layers": 80,
            "hidden_size": 8192,
            "num_attention_heads": 64,
            "num_query_groups": 8,
            "ffn_hidden_size": 28672,
        },
    ),
    "Llama3Config": (PLAIN, {"num_query_groups": 8, "init_method_std": 0.01}),
    "Llama3Config8B": (
        "Llama3Config",
        {
            "rotary_base": 500_000,
            "seq_length": 8192,
            "num_layers": 32,
            "hidden_size": 4096,
            "ffn_hidden_size": 14336,
            "num_attention_heads": 32,
        },
    ),
    "Llama3Config70B": (
        "Llama3Config",
        {
            "rotary_base": 500_000,
            "seq_length": 8192,
            "num_layers": 80,
            "hidden_size": 8192,
            "ffn_hidden_size": 28672,
            "num_attention_heads": 64,
            "init_method_std": 0.008944,
        },
    ),
    SCALED: (
        "Llama3Config",
        {
            "scale_factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "old_context_len": 8192,
            "init_method_std": 0.02,
        },
    ),
    "Llama31Config8B": (
        SCALED,
        {
            "rotary_base": 500_000,
            "seq_length": 131072,
            "num_layers": 32,
            "hidden_size": 4096,
            "ffn_hidden_size": 14336,
            "num_attention_heads": 32,
        },
    ),
    "Llama31Config70B": (
        SCALED,
        {
            "rotary_base": 500_000,
            "seq_length": 131072,
            "num_layers": 80,
            "hidden_size": 8192,
            "ffn_hidden_size": 28672,
            "num_attention_heads": 64,
        },
    ),
    "Llama31Config405B": (
        SCALED,
        {
            "rotary_base": 500_000,
            "seq_length": 131072,
            "num_layers": 126,
            "hidden_size": 16384,
            "ffn_hidden_size": 53248,
            "num_attention_heads": 128,
        },
    ),
    "Llama32Config1B": (
        SCALED,
        {
            "scale_factor": 32.0,
            "share_embeddings_and_output_weights": True,
            "rotary_base": 500_000,
            "seq_length": 131072,
            "num_layers": 16,
            "hidden_size": 2048,
            "ffn_hidden_size": 8192,
            "num_attention_heads": 32,
        },
    ),
    "Llama32Config3B": (
        SCALED,
        {
            "scale_factor": 32,
            "share_embeddings_and_output_weights": True,
            "rotary_base": 500_000,
            "seq_length": 131072,
            "num_layers": 28,
            "hidden_size": 3072,
            "ffn_hidden_size": 8192,
            "num_attention_heads": 24,
        },
    ),
    "CodeLlamaConfig7B": ("Llama2Config7B", {"rotary_base": 1_000_000, "seq_length": 16384}),
    "CodeLlamaConfig13B": ("Llama2Config13B", {"rotary_base": 1_000_000, "seq_length": 16384}),
    "CodeLlamaConfig70B": ("Llama2Config70B", {}),
    "CodeLlamaConfig34B": (
        PLAIN,
        {
            "rotary_base": 1_000_000,
            "seq_length": 16384,
            "num_layers": 48,
            "hidden_size": 8192,
            "num_attention_heads": 64,
            "num_query_groups": 8,
            "ffn_hidden_size": 22016,
        },
    ),
}

KNOWN = tuple(_CLASSES)

# Fields that a checkpoint may state, and the only values with which the model is a Llama as Hugging Face has it.
REQUIRED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "layernorm_zero_centered_gamma": False,
    "num_moe_experts": None,
}


def defaults(name: str) -> dict[str, Any]:
    """Return the fields that a config class sets, its parents' included."""
    parent, fields = _CLASSES[name]
    return {**(defaults(parent) if parent else {}), **fields}
