"""Matrix products in fp32 on the CPU, by oneDNN.

PyTorch leaves them to MKL, which does not use AVX-512 on processors of other makers than Intel. oneDNN, which PyTorch
uses for bf16, does: on an AMD EPYC (Zen 5) it is two to three times as fast.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what ``torch.nn.functional.linear`` does, up to rounding."""
    fast = (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()  # oneDNN's operator has no backward pass
        and torch.backends.mkldnn.is_available()
    )
    if not fast:
        return functional.linear(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """A linear layer that multiplies with ``linear``."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs [..., in] times the weight, plus the bias: [..., out]."""
        return linear(inputs, self.weight, self.bias)


def use_fast_linear(model: nn.Module) -> None:
    """Have all linear layers of a model multiply with ``linear``."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
