"""A model with random masks, of another density in each matrix, so that no two are mistaken for each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.model.layout import Layout


class RandomMasks:
    """Masks of all matrices of the decoder layers but a few."""

    def __init__(self, source: WeightSource, seed: int = 0, dense: Iterable[str] = ()) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = shape_of(source)
        self.masks: dict[str, torch.Tensor] = {}
        for index, (name, (part, entry)) in enumerate(Layout.for_config(source.config).parts(shape).items()):
            if entry.layer is not None and len(part.axes) == 2 and name not in dense:
                self.masks[name] = torch.rand(part.size(shape), generator=generator) < 0.3 + 0.05 * (index % 9)
        self.names = tuple(self.masks)

    def read(self, name: str) -> torch.Tensor:
        return self.masks[name]


class MaskedSource:
    """A model whose weights are zero under masks."""

    def __init__(self, source: WeightSource, masks: RandomMasks | None = None) -> None:
        self._source = source
        self.masks = self._applied = masks or RandomMasks(source)
        self.config: Any = source.config
        self.assets = source.assets

    def read(self, name: str) -> torch.Tensor:
        weight = self._source.read(name)
        return weight.masked_fill(~self._applied.read(name), 0) if name in self._applied.masks else weight
