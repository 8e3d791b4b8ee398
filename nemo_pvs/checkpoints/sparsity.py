"""The sparsity of a checkpoint, matrix by matrix, and whether its zeros agree with its masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.model.layout import Layout

_PATTERNS = ((2, 4), (4, 8))
"""N:M patterns (N of every M consecutive weights of a row are zero) that hardware and the literature use."""


@dataclass(frozen=True)
class MatrixSparsity:
    """The zeros of one matrix."""

    name: str
    weights: int
    zeros: int
    masked: int | None
    """Weights that are pruned according to the mask; None if there is no mask."""
    disagreements: int
    """Pruned weights that are not zero, for example after training without the mask."""
    pattern: str
    """The N:M pattern of the zeros, such as 2:4; empty if none."""


def matrix_sparsity(source: WeightSource) -> Iterator[MatrixSparsity]:
    """Yield the sparsity of every matrix of the decoder layers, one in memory at a time."""
    masks = masks_of(source)
    masked = frozenset(masks.names)
    for name, (part, _) in Layout.for_config(source.config).parts(shape_of(source)).items():
        if part.layer is None or len(part.axes) < 2:
            continue
        weight = source.read(name)
        pruned = ~masks.read(name) if name in masked else None
        yield MatrixSparsity(
            name=name,
            weights=weight.numel(),
            zeros=int((weight == 0).sum()),
            masked=None if pruned is None else int(pruned.sum()),
            disagreements=0 if pruned is None else int((weight[pruned] != 0).sum()),
            pattern=next((f"{n}:{m}" for n, m in _PATTERNS if _keeps(weight, n, m)), ""),
        )


def _keeps(weight: torch.Tensor, n: int, m: int) -> bool:
    if weight.shape[-1] % m:
        return False
    zeros = (weight == 0).unflatten(-1, (-1, m)).sum(dim=-1)
    return bool((zeros >= n).all())
