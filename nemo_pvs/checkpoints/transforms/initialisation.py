"""How the weights of a model from scratch are distributed, matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nemo_pvs.model.layout import Entry, Part
from nemo_pvs.model.shape import Shape

Initialisation = Literal["megatron", "maxtext", "normal"]

# Standard deviation of a standard normal variable that is cut off at -2 and 2.
_CUT_OFF_DEVIATION = 0.87962566103423978


@dataclass(frozen=True)
class Distribution:
    """A normal distribution with mean 0, whole or cut off at two standard deviations."""

    scale: float
    """Standard deviation of the whole distribution."""
    cut_off: bool = False
    """Nothing lies beyond ``2 * scale``."""

    @property
    def deviation(self) -> float:
        """Standard deviation of what is drawn."""
        return self.scale * (_CUT_OFF_DEVIATION if self.cut_off else 1)

    def draw(self, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Return a tensor of float32."""
        if not self.cut_off:
            return torch.empty(size).normal_(0, self.scale, generator=generator)
        bound = 2 * self.scale
        return torch.nn.init.trunc_normal_(torch.empty(size), 0, self.scale, -bound, bound, generator=generator)


def distribution(
    scheme: Initialisation, part: Part, entry: Entry, shape: Shape, config: Mapping[str, Any]
) -> Distribution:
    """Return the distribution of a matrix.

    ``megatron``: standard deviation ``initializer_range`` (0.02); what writes into the residual stream (attention
    output, MLP down) is divided by ``sqrt(2 L)``, as in GPT-2 and Megatron.

    ``maxtext``: of the MaxText that the published runs were trained with (training/maxtext in
    zlab-princeton/llm-pruning-collection, commit b5b0014). d is the hidden size, f the FFN's, h a head's, H the number
    of heads:

    ============  =====================  ======================================================================
    matrix        standard deviation     in the code
    ============  =====================  ======================================================================
    embedding     0.02, cut off          ``truncated_normal(stddev=0.02)``: 0.0176 is left (layers/models.py)
    query         ``1 / sqrt(d h)``      ``nd_dense_init(1.0, "fan_in", "normal")`` over ``sqrt(h)``
    key, value    ``1 / sqrt(d)``        ``nd_dense_init(1.0, "fan_in", "normal")`` (layers/attentions.py)
    output        ``1 / sqrt(H h)``      the same
    gate, up      ``1 / sqrt(d)``        ``nd_dense_init(1.0, "fan_in", "truncated_normal")``, cut off
    down          ``1 / sqrt(f)``        the same (layers/linears.py)
    head          ``1 / sqrt(d)``        the same (layers/decoders.py)
    ============  =====================  ======================================================================

    JAX cuts normals off at two standard deviations and, in ``variance_scaling``, widens them so that the deviation
    afterwards is the one above. Depth plays no part. MaxText divides the query's weights in place of the softmax's
    factor ``1 / sqrt(h)``; this copy of it has that factor as well, and converts weights to Hugging Face unscaled, so
    queries really start ``sqrt(h)`` times as small. The code rounds that root to bfloat16, 0.01 % off, which is
    left out here.

    ``normal``: standard deviation ``initializer_range`` everywhere: the published sparse baselines, redrawn by
    ``trunc_normal_(std=0.02)``, whose bounds of -2 and 2 cut nothing off (pruning/wanda/reinit.py, same commit).
    """
    usual = float(config.get("initializer_range", 0.02))
    if scheme == "normal":
        return Distribution(usual)
    if scheme == "megatron":
        writes = entry.layer is not None and part.axes[0] == "hidden"
        return Distribution(usual / (2 * shape.layers) ** 0.5 if writes else usual)
    if entry.megatron.startswith("embedding."):
        return Distribution(0.02, cut_off=True)
    spread = part.size(shape)[1] ** -0.5
    if part.axes[0] == "query":
        return Distribution(spread * shape.head_dim**-0.5)
    if part.axes[0] == "key" or part.axes[1] == "query":
        return Distribution(spread)
    return Distribution(spread / _CUT_OFF_DEVIATION, cut_off=True)
