"""Gates: a factor for each unit of a model, learned by Sheared LLaMA and applied while Megatron runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from nemo_pvs.checkpoints.masks import Masks, masks_of
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Entry, Layout, TensorPart
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Indices, Plan

UNITS = ("hidden", "groups", "ffn", "layers")


@dataclass(frozen=True)
class Gates:
    """The factors of all units of a model with L even layers; fp32, or bool for kept units."""

    hidden: torch.Tensor
    """[d], for hidden channels; shared by all layers."""
    groups: torch.Tensor
    """[L, G], for KV groups with their query heads."""
    ffn: torch.Tensor
    """[L, f], for FFN channels."""
    layers: torch.Tensor
    """[L], for both blocks of a layer."""

    @cached_property
    def kept_hidden(self) -> tuple[torch.Tensor, float]:
        """Hidden channels that the norms average over, bool [d], and their share of all."""
        kept = self.hidden != 0
        return kept, max(1, int(kept.sum())) / len(kept)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The four tensors in the order of ``UNITS``."""
        return self.hidden, self.groups, self.ffn, self.layers

    def requires_grad_(self) -> Gates:
        """Enable gradients of all factors; return self."""
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
    """Return the plan that keeps every unit with a nonzero gate; layers may become uneven.

    Raises:
        UserError: no layer or hidden channel is kept, or a kept layer has no KV group or FFN channel.
    """

    def kept(row: torch.Tensor) -> Indices:
        return tuple(row.nonzero().flatten().tolist())

    layers, hidden = kept(gates.layers), kept(gates.hidden)
    ffn = tuple(kept(gates.ffn[layer]) for layer in layers)
    groups = tuple(kept(gates.groups[layer]) for layer in layers)
    if not hidden or not layers:
        raise UserError(f"The gates leave no {'layers' if hidden else 'hidden channels'}; remove less.")
    for layer, channels, kept_groups in zip(layers, ffn, groups, strict=True):
        if not channels or not kept_groups:
            raise UserError(
                f"The gates leave no {'KV groups' if channels else 'FFN channels'} in layer {layer}; ask for less."
            )
    even = parent.replace(layers=len(layers), hidden=len(hidden))
    sizes = []
    for size, channels, kept_groups in zip(even.layer_sizes, ffn, groups, strict=True):
        heads = len(kept_groups) * parent.heads_per_group
        sizes.append(size._replace(ffn=len(channels), kv_groups=len(kept_groups), heads=heads))
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
    """A model with the gates folded into its weights: slicing it computes the same function as the gated model.

    Hidden gates are multiplied into the norms' weights and the rows of ``o_proj`` and ``down_proj``, and nothing else:
    the published export of Sheared LLaMA (2310.06694) also multiplies the embedding, which is not gated in training,
    and the output head, whose input the last norm has already gated. A KV group's gate is multiplied once, into the
    rows of ``v_proj``; published code for GQA multiplies q, k, v and o.
    """

    def __init__(self, source: WeightSource, gates: Gates) -> None:
        """Prepare without reading tensors; a hidden channel whose gate is zero gets a norm weight of zero."""
        self._source = source
        self._gates = gates
        self._shape = shape_of(source)
        self._parts = Layout.for_config(source.config).parts(self._shape)
        self.config = source.config
        self.assets = source.assets
        self.masks: Masks = masks_of(source)  # a factor leaves zeros where they are

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, multiplied in fp32 and rounded once to its dtype."""
        tensor = self._source.read(name)
        factors = self._factors(*self._parts[name])
        if factors is None:
            return tensor
        factors = factors.to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))
        return (tensor * factors.view(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)

    def _factors(self, part: TensorPart, entry: Entry) -> torch.Tensor | None:
        """Return the factors of a tensor's rows [rows]; None if it is not gated."""
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
