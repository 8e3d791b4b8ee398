"""Pads uneven layers with zeros to a stock model of their common bounds, which computes the same function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.masks import Masks, masks_of
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape


def pad_layers(source: WeightSource) -> WeightSource:
    """Return a source whose layers are even: ``source`` itself if they are, else a padded view of it."""
    return PaddedSource(source) if shape_of(source).uneven else source


class PaddedSource:
    """An uneven model padded to its bounds; it is no smaller than an even one, but stock classes run it.

    Zeros are appended to the FFN channels of a layer, to the query heads of each KV group and, as whole groups, to its
    KV groups. An added FFN channel is silu(0) * 0 and an added head has only zeros in ``o_proj``: neither reaches the
    residual stream, with or without biases. Norms run over the hidden size, which is not padded.
    """

    def __init__(self, source: WeightSource) -> None:
        """Wrap a model; no weight is read yet.

        Raises:
            UserError: the config is not of a known family.
        """
        self._source = source
        self._shape = shape_of(source)
        self._bounds = self._shape.replace(uneven=())
        layout = Layout.for_config(source.config)
        self._parts = layout.parts(self._shape)
        self.config: Mapping[str, Any] = layout.config(self._bounds, source.config)
        self.masks = _PaddedMasks(masks_of(source), self._pad)

    @property
    def assets(self) -> tuple[Path, ...]:
        """The source's tokenizer and other files."""
        return self._source.assets

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the even model in the source's dtype."""
        return self._pad(name, self._source.read(name))

    def _pad(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        part, _ = self._parts[name]
        layer = self._shape.at(part.layer)
        for dimension, axis in enumerate(part.axes):
            if tensor.shape[dimension] < self._bounds.axis(axis):
                size = list(tensor.shape)
                size[dimension] = self._bounds.axis(axis)
                positions = _positions(axis, layer, self._bounds)
                tensor = tensor.new_zeros(size).index_copy_(dimension, positions, tensor)
        return tensor


class _PaddedMasks:
    """The masks of a PaddedSource (``checkpoints.masks.Masks``): added zeros count as pruned."""

    def __init__(self, masks: Masks, pad: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        self.names = masks.names
        self.read = lambda name: pad(name, masks.read(name))


def _positions(axis: str, layer: Shape, bounds: Shape) -> torch.Tensor:
    """Return the positions of a layer's channels along an axis of the bounds."""
    inner, outer = _blocks(axis, layer), _blocks(axis, bounds)
    channels = torch.arange(math.prod(outer)).view(outer)
    return channels[tuple(slice(size) for size in inner)].flatten()


def _blocks(axis: str, shape: Shape) -> tuple[int, ...]:
    """Return the sizes of an axis's nested blocks, each of which is padded at its end: heads are stored by group."""
    return {
        "ffn": (shape.ffn,),
        "query": (shape.kv_groups, shape.heads_per_group, shape.head_dim),
        "key": (shape.kv_groups, shape.head_dim),
    }[axis]
