"""GGUF files out of Hugging Face models, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import PreTrainedModel
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

BYTES = [character for _, character in sorted(bytes_to_unicode().items())]
"""What byte-level tokenizers write for each of the 256 bytes."""

BYTE_TOKENIZER: dict[str, Any] = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": [*BYTES, "<|end|>"],
    "token_type": [1] * 256 + [3],
    "eos_token_id": 256,
}

MERGING_TOKENIZER: dict[str, Any] = {
    **BYTE_TOKENIZER,
    "tokens": [*BYTE_TOKENIZER["tokens"], "ab", "Ġx"],
    "token_type": [1] * 256 + [3, 1, 1],
    "merges": ["a b", "Ġ x"],
    "bos_token_id": 256,
}
"""One that llama.cpp loads: it refuses files without merges."""

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    tokenizer: Mapping[str, Any] = BYTE_TOKENIZER,
    matrices: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write a model; ``keys`` and ``tensors`` replace what is written, and None leaves it out."""
    config, architecture = model.config, model.config.model_type
    every_key = {
        "general.architecture": architecture,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.key_length": head_dim(model),
        f"{architecture}.attention.value_length": head_dim(model),
        f"{architecture}.rope.dimension_count": head_dim(model),
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": config.rope_theta,
        **{f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()},
        **(keys or {}),
    }
    every_tensor = {**_tensors(model), **(tensors or {})}
    writer = GGUFWriter(path, every_key.pop("general.architecture"))
    for key, value in every_key.items():
        add_key(writer, key, value)
    for name, tensor in every_tensor.items():
        if tensor is not None:
            kind = matrices if tensor.ndim > 1 else GGMLQuantizationType.F32
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def head_dim(model: PreTrainedModel) -> int:
    """Return the channels of a head, which a Qwen 2 config does not state."""
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


def _tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if model.config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = tensor.shape[0] // head_dim(model)
            tensor = tensor.reshape(heads, 2, head_dim(model) // 2, *tensor.shape[1:]).swapaxes(1, 2)
            tensor = tensor.reshape(heads * head_dim(model), *tensor.shape[3:])
        module, _, kind = name.rpartition(".")
        layer = module.split(".")[2] if module.startswith("model.layers.") else None
        own = module if layer is None else module.removeprefix(f"model.layers.{layer}.")
        prefix = "" if layer is None else f"blk.{layer}."
        tensors[f"{prefix}{_NAMES[own]}.{kind}"] = tensor.float().contiguous().numpy()
    return tensors


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key with the type of its value; None adds nothing."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Give every vector, biases included, random values: fresh models have ones and zeros, which hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model
