"""Initialisation schemes: the distribution of each matrix of a model trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nemo_pvs.model.layout import Entry, TensorPart
from nemo_pvs.model.shape import Shape

InitialisationScheme = Literal["megatron", "maxtext", "normal"]

# Standard deviation of a standard normal variable truncated at -2 and 2.
_CUT_OFF_DEVIATION = 0.87962566103423978


@dataclass(frozen=True)
class Distribution:
    """A normal distribution with mean 0, optionally truncated at two standard deviations."""

    scale: float
    """Standard deviation before truncation."""
    cut_off: bool = False
    """Whether to truncate at ``-2 * scale`` and ``2 * scale``."""

    @property
    def deviation(self) -> float:
        """Standard deviation of the drawn values."""
        return self.scale * (_CUT_OFF_DEVIATION if self.cut_off else 1)

    def draw(self, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw a float32 tensor."""
        if not self.cut_off:
            return torch.empty(size).normal_(0, self.scale, generator=generator)
        bound = 2 * self.scale
        return torch.nn.init.trunc_normal_(torch.empty(size), 0, self.scale, -bound, bound, generator=generator)


def distribution(
    scheme: InitialisationScheme, part: TensorPart, entry: Entry, shape: Shape, config: Mapping[str, Any]
) -> Distribution:
    """Return the distribution of a matrix.

    ``megatron``: standard deviation ``initializer_range`` (0.02), divided by ``sqrt(2 L)`` for matrices that write
    into the residual stream (attention output, MLP down), as in GPT-2 and Megatron.

    ``maxtext``: the scheme of the MaxText copy with which the published runs were trained (training/maxtext in
    zlab-princeton/llm-pruning-collection, commit b5b0014). d is the hidden size, f the FFN size, h the size of a head
    and H the number of heads:

    ============  =====================  ======================================================================
    matrix        standard deviation     in the code
    ============  =====================  ======================================================================
    embedding     0.02, truncated        ``truncated_normal(stddev=0.02)``: 0.0176 after it (layers/models.py)
    query         ``1 / sqrt(d h)``      ``nd_dense_init(1.0, "fan_in", "normal")`` over ``sqrt(h)``
    key, value    ``1 / sqrt(d)``        ``nd_dense_init(1.0, "fan_in", "normal")`` (layers/attentions.py)
    output        ``1 / sqrt(H h)``      the same
    gate, up      ``1 / sqrt(d)``        ``nd_dense_init(1.0, "fan_in", "truncated_normal")``
    down          ``1 / sqrt(f)``        the same (layers/linears.py)
    head          ``1 / sqrt(d)``        the same (layers/decoders.py)
    ============  =====================  ======================================================================

    JAX truncates normals at two standard deviations and, in ``variance_scaling``, widens them first so that the
    deviation after truncation is the one above. Depth plays no role. MaxText divides the query's weights by
    ``sqrt(h)`` instead of applying the softmax's factor ``1 / sqrt(h)``; this copy applies that factor as well and
    converts weights to Hugging Face unscaled, so queries really start smaller by ``sqrt(h)``. The code rounds that
    root to bfloat16 (0.01 % off), which is not reproduced here.

    ``normal``: standard deviation ``initializer_range`` everywhere, as in the published sparse baselines, which are
    redrawn by ``trunc_normal_(std=0.02)`` with bounds of -2 and 2 that truncate nothing (pruning/wanda/reinit.py, same
    commit).
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
