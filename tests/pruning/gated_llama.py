"""A transformers Llama with gates: hooks and plain norms, nothing sliced and no weight changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaForCausalLM

from nemo_pvs.pruning.learned.gates import Gates


class GatedNorm(nn.Module):
    """RMSNorm over the channels whose gate is not zero, times the gates."""

    def __init__(self, norm: nn.Module, current: Callable[[], Gates]) -> None:
        super().__init__()
        self.weight, self.eps, self.current = norm.weight, norm.variance_epsilon, current

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gates = self.current().hidden
        kept = gates.nonzero().flatten()
        mean_square = hidden[..., kept].square().mean(-1, keepdim=True)
        return gates * self.weight * hidden * torch.rsqrt(mean_square + self.eps)


def gated(model: LlamaForCausalLM, current: Callable[[], Gates]) -> LlamaForCausalLM:
    """Let the gates that ``current`` returns act on a model."""

    def hook(layer: int) -> None:
        block = model.model.layers[layer]
        size = model.config.hidden_size, model.config.num_attention_heads * model.config.head_dim

        def context(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            groups = current().groups[layer]
            return (inputs[0] * groups.repeat_interleave(size[1] // len(groups)),)

        def intermediate(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (inputs[0] * current().ffn[layer],)

        def added(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            return output * current().layers[layer] * current().hidden

        block.input_layernorm = GatedNorm(block.input_layernorm, current)
        block.post_attention_layernorm = GatedNorm(block.post_attention_layernorm, current)
        block.self_attn.o_proj.register_forward_pre_hook(context)
        block.mlp.down_proj.register_forward_pre_hook(intermediate)
        for module in (block.self_attn.o_proj, block.mlp.down_proj):
            module.register_forward_hook(added)

    for layer in range(len(model.model.layers)):
        hook(layer)
    model.model.norm = GatedNorm(model.model.norm, current)
    return model
