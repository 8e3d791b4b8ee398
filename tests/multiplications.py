"""Count the multiplications in products of matrices; attention has a separate kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_pvs.layerwise.linear import linear

ONEDNN = torch.ops.mkldnn._linear_pointwise.default
"""What ``nemo_pvs.layerwise.linear`` calls."""
ATEN = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def multiplications(work: Callable[[], Any]) -> int:
    """Return how many numbers a piece of work multiplies with a number of a matrix."""
    return multiplied(work).total()


def multiplied(work: Callable[[], Any]) -> Counter[Any]:
    """Return the same by the operator that multiplies."""
    with torch.no_grad():
        linear(torch.ones(1, 1), torch.ones(1, 1))  # tries the operator once in a process
    with _Products() as products:
        work()
    return products.counts


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATEN:
            left, right = args[-2:]
            self.counts[func] += left.numel() * right.shape[1]
        elif func == ONEDNN:
            inputs, weight = args[:2]
            self.counts[func] += inputs.numel() * weight.shape[0]
        return func(*args, **(kwargs or {}))
