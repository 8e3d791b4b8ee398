"""Adds zero biases to a Llama that has biases only in its attention or only in its MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.model.layout import Layout

_BOTH = {"attention_bias", "mlp_bias"}


def with_both_biases(source: WeightSource) -> WeightSource:
    """Return a source with both attention_bias and mlp_bias or neither that computes the same function.

    Megatron has one switch, ``add_bias_linear``, for all linear modules of its layers. The source of a family that
    cannot have both is returned as it is.
    """
    layout = Layout.for_config(source.config)
    only_one = len(_BOTH & {*shape_of(source).features}) == 1
    return _ZeroBiases(source) if only_one and _BOTH.issubset(layout.optional) else source


class _ZeroBiases:
    """A model with its missing biases added as zeros."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        shape, layout = shape_of(source), Layout.for_config(source.config)
        self._shape = shape.replace(features=tuple(sorted(_BOTH | {*shape.features})))
        parts = layout.parts(self._shape)
        self._added = {name: parts[name][0] for name in parts.keys() - layout.parts(shape).keys()}
        self.config: Mapping[str, Any] = layout.config(self._shape, source.config)
        self.masks = masks_of(source)

    @property
    def assets(self) -> tuple[Path, ...]:
        return self._source.assets

    def read(self, name: str) -> torch.Tensor:
        if name in self._added:
            return torch.zeros(self._added[name].size(self._shape), dtype=self._dtype)
        return self._source.read(name)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The dtype of the first weight that gets a bias."""
        return self._source.read(f"{min(self._added).removesuffix('bias')}weight").dtype
