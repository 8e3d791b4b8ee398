"""Gates: a factor for each unit of a model; what Sheared LLaMA learns, and what Megatron's models are run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Entry, Layout, Part
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Indices, Plan

UNITS = ("hidden", "groups", "ffn", "layers")


@dataclass(frozen=True)
class Gates:
    """The factors of all units of a model with L even layers; fp32, or bool for units that are kept or not."""

    hidden: torch.Tensor
    """[d]: one factor of a hidden channel, shared by all layers."""
    groups: torch.Tensor
    """[L, G], of KV groups with the query heads that belong to them."""
    ffn: torch.Tensor
    """[L, f]"""
    layers: torch.Tensor
    """[L], of both blocks of a layer."""

    @cached_property
    def kept_hidden(self) -> tuple[torch.Tensor, float]:
        """Which hidden channels take part in the norms, bool [d], and their share."""
        kept = self.hidden != 0
        return kept, max(1, int(kept.sum())) / len(kept)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The four of them, in the order of ``UNITS``."""
        return self.hidden, self.groups, self.ffn, self.layers

    def requires_grad_(self) -> Gates:
        """Let every factor collect its gradient; return self."""
        for tensor in self.tensors:
            tensor.requires_grad_()
        return self


def gate_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the size of the gates of each kind of unit."""
    return {
        "hidden": (shape.hidden,),
        "groups": (shape.layers, shape.kv_groups),
        "ffn": (shape.layers, shape.ffn),
        "layers": (shape.layers,),
    }


def plan_of_gates(method: str, parent: Shape, gates: Gates, provenance: Mapping[str, Any]) -> Plan:
    """Return the plan that keeps every unit whose gate is not zero; layers may become uneven.

    Raises:
        UserError: nothing is left of the hidden channels, or of a layer that is kept.
    """

    def kept(row: torch.Tensor) -> Indices:
        return tuple(row.nonzero().flatten().tolist())

    layers, hidden = kept(gates.layers), kept(gates.hidden)
    ffn = tuple(kept(gates.ffn[layer]) for layer in layers)
    groups = tuple(kept(gates.groups[layer]) for layer in layers)
    if not hidden or not layers:
        raise UserError(f"The gates leave no {'layers' if hidden else 'hidden channels'}; ask for less.")
    for layer, channels, own in zip(layers, ffn, groups, strict=True):
        if not channels or not own:
            raise UserError(
                f"The gates leave no {'KV groups' if channels else 'FFN channels'} in layer {layer}; ask for less."
            )
    even = parent.replace(layers=len(layers), hidden=len(hidden))
    sizes = [
        size._replace(ffn=len(channels), kv_groups=len(own), heads=len(own) * parent.heads_per_group)
        for size, channels, own in zip(even.layer_sizes, ffn, groups, strict=True)
    ]
    return Plan(
        method=method,
        parent=parent,
        target=even.with_layers(sizes),
        keep_layers=layers,
        keep_hidden=hidden,
        keep_ffn=ffn,
        keep_kv_groups=groups,
        provenance=provenance,
    )


class FoldedSource:
    """A model with the gates multiplied into its weights: what is left after slicing computes what the gated one did.

    Hidden gates go into the norms' weights and into the rows of ``o_proj`` and ``down_proj``, and into nothing else:
    the published export also multiplies the embedding, which is not gated in training, and the output head, whose
    input the last norm has gated already. A KV group's gate goes once into the rows of ``v_proj``; published code for
    GQA multiplies q, k, v and o (spec Q-SH-2).
    """

    def __init__(self, source: WeightSource, gates: Gates) -> None:
        """Prepare; nothing is read yet. The gates of hidden channels that are zero make norms of zero weight."""
        self._source = source
        self._gates = gates
        self._shape = shape_of(source)
        self._parts = Layout.for_config(source.config).parts(self._shape)
        self.config = source.config
        self.assets = source.assets

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, multiplied in fp32 and rounded once to its own dtype."""
        tensor = self._source.read(name)
        factors = self._factors(*self._parts[name])
        if factors is None:
            return tensor
        factors = factors.to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))
        return (tensor * factors.view(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)

    def _factors(self, part: Part, entry: Entry) -> torch.Tensor | None:
        """Return the factors of a tensor's rows; None if they are not gated."""
        gates, layer, module = self._gates, part.layer, entry.megatron
        if module.endswith(("layer_norm_weight", "final_layernorm.weight")):
            return gates.hidden
        if layer is None:
            return None
        if "linear_proj." in module or "linear_fc2." in module:
            return gates.hidden * gates.layers[layer]
        if entry.fuse == "qkv" and part == entry.parts[2]:
            return gates.groups[layer].repeat_interleave(self._shape.head_dim)
        if entry.fuse == "gate_up" and part == entry.parts[1]:
            return gates.ffn[layer]
        return None
