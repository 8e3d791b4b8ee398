"""Count the products of matrices that a piece of work multiplies out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

ONEDNN = torch.ops.mkldnn._linear_pointwise
"""What ``nemo_pvs.layerwise.linear`` calls, which PyTorch does not count itself."""


def multiplications(work: Callable[[], Any]) -> int:
    """Return the number of products of two numbers, those of attention left out."""
    with FlopCounterMode(display=False, custom_mapping={ONEDNN: of_linear}) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm, ONEDNN)) // 2


def of_linear(inputs: Sequence[int], weight: Sequence[int], *others: Any, **ignored: Any) -> int:
    """Return the FLOPs of oneDNN's operator, from the shapes of its arguments."""
    return 2 * prod(inputs) * weight[0]
