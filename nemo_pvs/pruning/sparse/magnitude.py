"""Magnitude pruning: remove the smallest weights of every matrix; needs no data and one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.pruning.sparse.sparsity import Sparsity, lowest, lowest_in_groups, prunable, up_to_threshold


def magnitude_mask(weight: torch.Tensor, sparsity: Sparsity, *, compat: bool = False) -> torch.Tensor:
    """Return the mask of kept weights, bool [outputs, inputs]: all but the smallest of the matrix or N:M group.

    The score of a weight is ``|W_ij|`` (Han et al., 1506.02626).

    Args:
        weight: [outputs, inputs].
        sparsity: How many to remove; exactly ``int(outputs * inputs * ratio)``, or N of M.
        compat: Prune up to a threshold as the script of Wanda (2306.11695, locuslab/wanda) does, which removes one
            more weight and all that tie with it.
    """
    scores = weight.abs()
    if sparsity.pattern:
        return ~lowest_in_groups(scores, sparsity.pattern)
    if compat:
        return ~up_to_threshold(scores, int(weight.numel() * sparsity.ratio))
    return ~lowest(scores.flatten(), sparsity.count(weight.numel())).view_as(weight)


class MagnitudeSource:
    """A model pruned by magnitude; each matrix is pruned when it is read."""

    def __init__(self, source: WeightSource, sparsity: Sparsity, *, compat: bool = False) -> None:
        """Prepare without reading tensors.

        Raises:
            UserError: the pattern does not divide a matrix.
        """
        self._source = source
        self._sparsity = sparsity
        self._compat = compat
        names: list[str] = []
        for entry in prunable(source, sparsity):
            names += [part.name for part in entry.parts]
        self.masks = _MagnitudeMasks(self, tuple(names))

    @property
    def config(self) -> Mapping[str, Any]:
        """The parent's: sparsity changes no size."""
        return self._source.config

    @property
    def assets(self) -> tuple[Path, ...]:
        """The parent's tokenizer and other files."""
        return self._source.assets

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in the parent's dtype, pruned if it is a decoder layer's matrix."""
        weight = self._source.read(name)
        return weight.masked_fill(~self._mask(weight), 0) if name in self.masks.names else weight

    def mask(self, name: str) -> torch.Tensor:
        """Return the mask of one matrix; true for kept weights."""
        return self._mask(self._source.read(name))

    def _mask(self, weight: torch.Tensor) -> torch.Tensor:
        return magnitude_mask(weight, self._sparsity, compat=self._compat)


class _MagnitudeMasks:
    def __init__(self, source: MagnitudeSource, names: tuple[str, ...]) -> None:
        self.names = names
        self._source = source

    def read(self, name: str) -> torch.Tensor:
        return self._source.mask(name)
