"""Megatron layers without Transformer Engine: causal SDPA attention and an RMSNorm that allows sequence parallelism.

Used on CPUs and on GPUs where Transformer Engine cannot be used. Megatron's own local attention builds the full
score matrix and a mask; this one is fused, needs no mask and shards heads over tensor parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from nemo.collections.llm.gpt.model.base import GPTConfig, default_layer_spec, gpt_data_step
from torch.nn.functional import scaled_dot_product_attention

from nemo_pvs.errors import UserError
from nemo_pvs.training.machine import has_transformer_engine

# Kernels of Transformer Engine and Apex that NeMo's Llama configs enable; where these libraries are not installed,
# Megatron rejects a config that enables them.
FUSED_KERNELS = (
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "cross_entropy_loss_fusion",
    "persist_layer_norm",
)


class SdpaCausalAttention(MegatronModule):
    """Megatron's core attention on ``torch.nn.functional.scaled_dot_product_attention``.

    Replaces ``DotProductAttention`` and is equivalent to it for causal self-attention without packing: same
    arguments, same ``[s, b, heads * head_dim]`` result. ``heads`` counts those of this tensor parallel rank.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or config.context_parallel_size != 1:
            raise ValueError(
                "SdpaCausalAttention is only for causal attention without context parallelism; use Transformer Engine."
            )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.window = config.window_size[0] if config.window_size else None

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        """Attend causally: query ``[s, b, heads, h]``, key and value ``[s, b, groups, h]`` -> ``[s, b, heads * h]``.

        ``attention_mask`` is ignored: pretraining uses no mask other than the causal one. With a KV cache, a single
        query attends to all keys (``attn_mask_type`` is then ``no_mask``).

        Raises:
            UserError: the sequence is longer than the model's sliding window (``window_size``).
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("SdpaCausalAttention takes neither packed sequences nor an attention bias.")
        if self.window is not None and key.shape[0] > self.window:
            raise UserError(
                f"Sequences of {key.shape[0]} tokens do not fit the model's attention window of {self.window}, and "
                "only Transformer Engine supports longer ones; install it or choose a shorter sequence_length."
            )
        context = scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=attn_mask_type != AttnMaskType.no_mask,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm with the attribute that makes Megatron sum its gradient over sequence parallel ranks.

    Megatron's ``WrappedTorchNorm`` does not set this attribute and so refuses sequence parallelism.
    """

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def sdpa_layer_spec(config: GPTConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the decoder block of this pipeline stage: Megatron's local layers with SDPA and our RMSNorm."""
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaCausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm
    )


def layer_spec(config: GPTConfig, vp_stage: int | None = None) -> ModuleSpec | TransformerBlockSubmodules:
    """Return NeMo's default layers where Transformer Engine can be used, otherwise the SDPA block."""
    return default_layer_spec(config, vp_stage) if has_transformer_engine() else sdpa_layer_spec(config, vp_stage)


def causal_data_step(dataloader_iter, use_mtp: bool = False) -> dict[str, torch.Tensor | None]:
    """Return NeMo's micro-batch with ``attention_mask`` None, for attention that is always causal.

    Without Transformer Engine, NeMo's forward step requires the key ``attention_mask`` and passes its value on.
    """
    return {"attention_mask": None, **gpt_data_step(dataloader_iter, use_mtp)}
