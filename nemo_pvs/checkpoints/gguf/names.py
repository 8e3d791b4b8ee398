"""The names of a model's tensors in GGUF files, and the order of the rows that rotary embeddings rotate."""

from __future__ import annotations

import re

import torch

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's rope scaling: how much longer the period of each pair of channels is."""

ROTATES_PAIRS = ("llama", "deci")
"""Architectures in which the two channels that a rotary embedding rotates are adjacent."""

_MODEL_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_TENSORS = {
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
_ROTATED = re.compile(r"\.(q|k)_proj\.")


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor from its Hugging Face name."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer is None:
        return _MODEL_TENSORS[name]
    return f"blk.{layer[1]}.{_LAYER_TENSORS[layer[2]]}.{layer[3]}"


def is_rotated(name: str) -> bool:
    """Return whether a tensor (weight or bias) makes queries or keys, whose channels rotary embeddings rotate."""
    return _ROTATED.search(name) is not None


def pairs_to_halves(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return the rows of ``q`` or ``k`` (weights or biases) in Hugging Face's order.

    Rotary embeddings rotate pairs of channels. In the files of ``ROTATES_PAIRS`` the two channels of a pair are
    adjacent, as in Meta's checkpoints; Hugging Face stores the first of every pair in the first half of a head, the
    second in the second half.
    """
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def halves_to_pairs(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo ``pairs_to_halves``."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
