"""Index all units of a model that pruning may remove in one vector, and map each weight to its units.

A unit is a hidden channel of the whole model, a KV group of a layer with its query heads, or an FFN channel of a
layer. A weight of a matrix belongs to one unit by its row and to another by its column, and is kept if both are. So
one vector of bits describes the masks of all tensors, and one vector of sums the saliency of all units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_pvs.model.layout import Entry
from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.pruning.plan import Indices, Plan


@dataclass(frozen=True)
class UnitSpace:
    """Indices of the units of an even model of L layers in a vector [d + L G + L f + 1].

    The last index stands for no unit: rows of the vocabulary and channels within a head belong to it.
    """

    shape: Shape

    @property
    def size(self) -> int:
        """Length of a vector of units, including the last index."""
        return self.fixed + 1

    @property
    def fixed(self) -> int:
        """The index of what is never removed."""
        return self.shape.hidden + self.shape.layers * (self.shape.kv_groups + self.shape.ffn)

    def everything(self) -> torch.Tensor:
        """Return the kept units before anything is removed: all true, bool [size]."""
        return torch.ones(self.size, dtype=torch.bool)

    def hidden(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the hidden channels' part of a vector, a view [d]."""
        return vector[: self.shape.hidden]

    def groups(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the KV groups' part of a vector, a view [L, G]."""
        first = self.shape.hidden
        count = self.shape.layers * self.shape.kv_groups
        return vector[first : first + count].view(self.shape.layers, self.shape.kv_groups)

    def ffn(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the FFN channels' part of a vector, a view [L, f]."""
        return vector[self.fixed - self.shape.layers * self.shape.ffn : self.fixed].view(self.shape.layers, -1)

    def along(self, axis: str, layer: int | None) -> torch.Tensor:
        """Return the unit of every position along a Layout axis, int64."""
        indices = torch.arange(self.size)
        if axis == "hidden":
            return self.hidden(indices)
        if axis == "ffn":
            return self.ffn(indices)[layer or 0]
        if axis in {"query", "key"}:
            # A group's heads are contiguous.
            return self.groups(indices)[layer or 0].repeat_interleave(self.shape.axis(axis) // self.shape.kv_groups)
        return indices[-1].expand(self.shape.axis(axis))

    def of_tensor(self, entry: Entry, *, rank: int = 0, ranks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the units of the rows [r] and columns [c] of one tensor-parallel rank's shard of a Megatron tensor.

        A vector counts as a matrix with one column, which belongs to no unit.
        """
        local = self.shape.replace(kv_groups=self.shape.kv_groups // ranks)
        rows, columns = [], torch.tensor([self.fixed])
        for part in entry.parts:
            part_rows = self.along(part.axes[0], part.layer)
            if len(part.axes) > 1:
                columns = self.along(part.axes[1], part.layer)
            if entry.tensor_parallel_axis == 0:
                part_rows = part_rows.chunk(ranks)[rank]
            rows.append(part_rows)
        if entry.tensor_parallel_axis == 1:
            columns = columns.chunk(ranks)[rank]
        return entry.join(rows, local), columns

    def kept_shape(self, kept: torch.Tensor) -> Shape:
        """Return the shape of the model that keeps these units.

        Args:
            kept: Kept units, bool [size]; at least one of every kind and layer.
        """
        sizes = zip(self.ffn(kept).sum(1).tolist(), self.groups(kept).sum(1).tolist(), strict=True)
        return self.shape.replace(hidden=int(self.hidden(kept).sum())).with_layers(
            LayerSizes(ffn, groups * self.shape.heads_per_group, groups) for ffn, groups in sizes
        )

    def plan(self, kept: torch.Tensor, method: str, provenance: Mapping[str, Any]) -> Plan:
        """Return the Plan that keeps these units, bool [size]."""

        def indices(row: torch.Tensor) -> Indices:
            return tuple(row.nonzero().flatten().tolist())

        return Plan(
            method=method,
            parent=self.shape,
            target=self.kept_shape(kept),
            keep_layers=tuple(range(self.shape.layers)),
            keep_hidden=indices(self.hidden(kept)),
            keep_ffn=tuple(map(indices, self.ffn(kept))),
            keep_kv_groups=tuple(map(indices, self.groups(kept))),
            provenance=provenance,
        )
