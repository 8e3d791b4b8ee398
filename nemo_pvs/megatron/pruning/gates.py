"""Gates on a Megatron model: factors of its KV groups, FFN channels, layers and hidden channels.

A gate of zero removes its unit from the computation as if its weights did not exist, also in the norms; a gate of one
changes nothing, not even the rounding. So a method that learns what to keep, or removes units while it trains, works
on a model whose tensors never change shape. The gates are not part of the model: they are plain tensors for all units
of the whole model on every rank, and each rank uses its part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from nemo.collections.llm.gpt.model.base import GPTConfig, transformer_engine_layer_spec
from torch import distributed
from torch.nn.functional import rms_norm

from nemo_pvs.errors import UserError
from nemo_pvs.megatron.attention import RMSNorm, sdpa_layer_spec
from nemo_pvs.pruning.learned.gates import Gates
from nemo_pvs.training.machine import has_transformer_engine

if HAVE_TE:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear


class GatedRMSNorm(RMSNorm):
    """An RMSNorm over the hidden channels that are kept, as in Sheared LLaMA (arXiv 2310.06694).

    The mean square, to which ``eps`` is added as usual, is taken over the channels whose gate is not zero, and the
    output is multiplied by the gates. Which channels are kept has no gradient.
    """

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(config, hidden_size, eps=eps)
        self.current: Callable[[], Gates | None] = lambda: None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise ``states`` [..., d].

        With k of d channels, sum/k + eps = (sum/d + eps k/d) d/k: this is PyTorch's norm of the states with removed
        channels set to zero, with eps k/d for eps and its weight multiplied by sqrt(k/d).
        """
        gates = self.current()
        if gates is None:
            return super().forward(states)
        kept, share = gates.kept_hidden
        weight = (self.weight * (gates.hidden * share**0.5)).to(states.dtype)
        return rms_norm(states * kept.to(states.dtype), weight.shape, weight, self.eps * share)


def gated_layer_spec(config: GPTConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, with norms that can be gated: not fused into the next linear layers.

    This is for ``transformer_layer_spec`` of a config; the names in checkpoints do not change.
    """
    if has_transformer_engine():
        layer = transformer_engine_layer_spec(config)
        layer.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        layer.submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear
        layer.submodules.sharded_state_dict_keys_map = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }
        block = TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage=vp_stage))
    else:
        block = sdpa_layer_spec(config, vp_stage)
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = GatedRMSNorm
    block.layer_norm = GatedRMSNorm
    return block


def install_gates(model: torch.nn.Module, current: Callable[[], Gates | None]) -> None:
    """Apply gates in every forward pass of a model from now on.

    Args:
        model: The GPTModel of a pipeline stage, or of a chunk of one, built with ``gated_layer_spec``; it may or may
            not be wrapped for data parallelism yet.
        current: Returns the gates to use in a pass; None for the dense model.

    Raises:
        UserError: the model was built with other norms.
    """
    layers = list(model.decoder.layers)
    norms = [module for module in model.modules() if isinstance(module, GatedRMSNorm)]
    if len(norms) < 2 * len(layers):
        raise UserError("Gates need unfused norms; build the model with transformer_layer_spec=gated_layer_spec.")
    for norm in norms:
        norm.current = current
    for layer in layers:
        sites = _Sites(
            current,
            layer.layer_number - 1,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        attention, mlp = layer.self_attention.linear_proj, layer.mlp.linear_fc2
        attention.register_forward_pre_hook(sites.context)
        mlp.register_forward_pre_hook(sites.intermediate)
        for block in (attention, mlp):
            block.register_forward_hook(sites.output)


@dataclass
class _Sites:
    """Hooks that apply the gates in one layer."""

    current: Callable[[], Gates | None]
    layer: int
    rank: int
    ranks: int

    def context(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Multiply the attention context [s, b, H h / TP] by the gates of its KV groups."""
        gates = self.current()
        if gates is None:
            return None
        groups = self._local(gates.groups)
        factors = groups.repeat_interleave(inputs[0].shape[-1] // len(groups))
        return (inputs[0] * factors.to(inputs[0].dtype), *inputs[1:])

    def intermediate(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Multiply silu(gate) * up [s, b, f / TP] by the gates of its FFN channels."""
        gates = self.current()
        if gates is None:
            return None
        return (inputs[0] * self._local(gates.ffn).to(inputs[0].dtype), *inputs[1:])

    def output(self, module: torch.nn.Module, inputs: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Multiply what a block adds to the residual stream, [s, b, d] or this rank's part of s, and its bias."""
        gates = self.current()
        if gates is None:
            return None
        factors = gates.layers[self.layer] * gates.hidden
        return tuple(part if part is None else part * factors.to(part.dtype) for part in outputs)

    def _local(self, gates: torch.Tensor) -> torch.Tensor:
        return gates[self.layer].chunk(self.ranks)[self.rank]


def gate_gradients(gates: Gates, *, sequence_parallel: bool) -> Gates:
    """Return the gates' gradients from all ranks, summed over pipeline stages and shards and averaged over DP.

    A tensor rank has gradients only for its own KV groups and FFN channels, and a pipeline stage only for its own
    layers. Gradients of hidden channels and layers are complete on every tensor rank, unless sequence parallelism
    gives each rank a part of the tokens.
    """
    tensors = gates.tensors
    parts = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    if not sequence_parallel:
        repeats = parallel_state.get_tensor_model_parallel_world_size()
        parts[0], parts[3] = parts[0] / repeats, parts[3] / repeats
    flat = torch.cat([part.flatten().float() for part in parts])
    distributed.all_reduce(flat)
    flat /= parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return Gates(*(piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)))
