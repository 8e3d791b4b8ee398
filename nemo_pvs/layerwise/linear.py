"""Matrix products in fp32 on the CPU, by oneDNN.

PyTorch leaves them to MKL, which does not use AVX-512 on processors that Intel did not make. oneDNN, which PyTorch
uses for bf16, does: on an AMD EPYC (Zen 5) it is two to three times as fast.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what ``torch.nn.functional.linear`` does, up to rounding."""
    fast = (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()  # oneDNN's operator has no backward pass
        and _has_operator()
    )
    return _by_onednn(inputs, weight, bias) if fast else functional.linear(inputs, weight, bias)


def _by_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


@cache
def _has_operator() -> bool:
    """Return whether this PyTorch has the operator, which is not public: only compiled models use it otherwise."""
    one = torch.ones(1, 1)
    try:
        return _by_onednn(one, one, None).item() == 1
    except (AttributeError, RuntimeError):
        return False


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
