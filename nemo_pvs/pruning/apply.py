"""Carry out a plan: a pruned model is a WeightSource that slices its parent's tensors as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.masks import Masks, NoMasks, masks_of
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.data.assets import asset_files
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout, TensorPart
from nemo_pvs.pruning.input_means import AXES
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.vocabulary.files import new_ids, renumbered, write_tokenizer
from nemo_pvs.pruning.vocabulary.tokenizer import BpeTokenizer


class PrunedSource:
    """The model that a plan keeps; writers stream it like any other source, with one tensor in memory at a time."""

    def __init__(self, source: WeightSource, plan: Plan) -> None:
        """Prepare the slices; the only tensors read are those that the model's fingerprint needs.

        Raises:
            UserError: the plan was made for another model, the model's family does not support the plan's biases, or
                the family's weight table is inconsistent.
        """
        shape = shape_of(source)
        if shape != plan.parent:
            raise UserError(f"The plan was made for [{plan.parent}], but this model is [{shape}]; plan again for it.")
        made_for = plan.provenance.get("model_fingerprint")
        if made_for is not None and fingerprint(source) != made_for:
            raise UserError("The plan was made for a model of this size with other weights; plan again for this one.")
        layout = Layout.for_config(source.config)
        self.config: Mapping[str, Any] = layout.config(plan.target, source.config)
        self._tokenizer = None
        if plan.keep_vocab is not None:
            self._tokenizer = BpeTokenizer(source.assets, source.config)
            self.config = renumbered(self.config, new_ids(plan.keep_vocab), "config.json")
        kept = plan.kept_parameters(layout)
        if kept != plan.target.parameters:
            raise UserError(
                f"According to conversions/{layout.family}.yaml the plan keeps {kept:,} parameters, but its target "
                f"[{plan.target}] has {plan.target.parameters:,}; fix the table."
            )
        self._source = source
        self._plan = plan
        self._origins = _origins(layout, plan)
        self._bias_weights = _bias_weights(layout, plan, self._origins)
        self._biases: dict[str, torch.Tensor] = {}
        masks = masks_of(source)
        if masks.names and plan.merged_heads:
            raise UserError(
                "The plan merges query heads, which would fill the zeros of this sparse model; plan again without "
                "merge_heads."
            )
        self.masks: Masks = _SlicedMasks(masks, plan, self._origins) if masks.names else NoMasks()

    @property
    def assets(self) -> tuple[Path, ...]:
        """The parent's tokenizer and other files; written without the removed tokens if the plan removes any."""
        return self._source.assets if self._tokenizer is None else asset_files(Path(self._written_tokenizer.name))

    @cached_property
    def _written_tokenizer(self) -> TemporaryDirectory[str]:
        """A folder with the pruned tokenizer, which exists as long as this source."""
        assert self._tokenizer is not None
        assert self._plan.keep_vocab is not None
        folder = TemporaryDirectory(prefix="nemo_pvs_tokenizer_")
        write_tokenizer(self._tokenizer, self._plan.keep_vocab, Path(folder.name))
        return folder

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the pruned model, in the parent's dtype.

        Computing a bias that compensates for removed inputs reads the parent's whole weight, so biases are cached.
        """
        if name in self._bias_weights:
            if name not in self._biases:
                self._biases[name] = self._bias(name)
            return self._biases[name].clone()
        return self._sliced(name)

    def _sliced(self, name: str) -> torch.Tensor:
        """Return the slice of a parent's tensor that the plan keeps, after merging query heads."""
        origin, layer = self._origins[name]
        tensor = self._source.read(origin.name)
        if layer is not None and self._plan.merged_heads and origin.axes[0] == "query":
            tensor = _merge_heads(tensor, self._plan.merged_heads[layer], self._plan.parent.head_dim)
        return _slice(tensor, origin, layer, self._plan)

    def _bias(self, name: str) -> torch.Tensor:
        """Return the parent's bias (or zeros) plus the mean contribution of the removed inputs, summed in fp32."""
        weight, layer = self._bias_weights[name]
        outputs, inputs = weight.axes
        if name in self._origins:
            bias = self._sliced(name)
        else:
            bias = torch.zeros(len(self._plan.kept(outputs, layer)), dtype=self._dtype)
        if self._plan.input_means is None or inputs not in AXES:
            return bias
        matrix = self._source.read(weight.name)
        rows = torch.tensor(self._plan.kept(outputs, layer), dtype=torch.long, device=matrix.device)
        removed = torch.tensor(self._plan.removed(inputs, layer), dtype=torch.long, device=matrix.device)
        means = self._plan.input_means.at(inputs, layer).to(matrix.device)
        lost = matrix.index_select(1, removed).index_select(0, rows).float() @ means
        return (bias.to(matrix.device).float() + lost).to(bias.dtype)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """Dtype of the biases that the parent lacks: that of the first weight that gets a bias."""
        weight, _ = next(iter(self._bias_weights.values()))
        return self._source.read(weight.name).dtype


class _SlicedMasks:
    """The parent's masks, sliced like their weights."""

    def __init__(self, masks: Masks, plan: Plan, origins: Mapping[str, tuple[TensorPart, int | None]]) -> None:
        self._masks = masks
        self._plan = plan
        self._origins = {name: origin for name, origin in origins.items() if origin[0].name in set(masks.names)}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._origins)

    def read(self, name: str) -> torch.Tensor:
        origin, layer = self._origins[name]
        return _slice(self._masks.read(origin.name), origin, layer, self._plan)


def _merge_heads(tensor: torch.Tensor, pairs: Sequence[tuple[int, int]], head_dim: int) -> torch.Tensor:
    """Return a weight or bias of ``q_proj`` [H*h, ...] with ``head_i + (head_i - head_j)`` for each pair (i, j).

    Sums are fp32, the result has the tensor's dtype.
    """
    heads = tensor.unflatten(0, (-1, head_dim)).clone()
    for kept, removed in pairs:
        heads[kept] = (2 * heads[kept].float() - heads[removed].float()).to(heads.dtype)
    return heads.flatten(0, 1)


def _slice(tensor: torch.Tensor, origin: TensorPart, layer: int | None, plan: Plan) -> torch.Tensor:
    """Return the slice of a parent's tensor that a plan keeps; ``layer`` is its index in the pruned model."""
    for dimension, axis in enumerate(origin.axes):
        keep = plan.kept(axis, layer)
        if len(keep) < tensor.shape[dimension]:
            tensor = tensor.index_select(dimension, torch.tensor(keep, device=tensor.device))
    return tensor


def _origins(layout: Layout, plan: Plan) -> dict[str, tuple[TensorPart, int | None]]:
    """Map each tensor of the pruned model to the parent's tensor and the layer's index in the pruned model.

    Biases that the parent lacks are not included.
    """
    parents = {(entry.layer, entry.megatron): entry for entry in layout.entries(plan.parent)}
    origins: dict[str, tuple[TensorPart, int | None]] = {}
    for entry in layout.entries(plan.target):
        parent = parents.get((None if entry.layer is None else plan.keep_layers[entry.layer], entry.megatron))
        if parent is not None:
            for part, origin in zip(entry.parts, parent.parts, strict=True):
                origins[part.name] = (origin, entry.layer)
    return origins


def _bias_weights(
    layout: Layout, plan: Plan, origins: Mapping[str, tuple[TensorPart, int | None]]
) -> dict[str, tuple[TensorPart, int]]:
    """Map each bias that is not merely sliced to the parent's weight and the layer's index in the pruned model.

    These are the biases that the parent lacks, and those that compensate for removed inputs.
    """
    weights: dict[str, tuple[TensorPart, int]] = {}
    if plan.input_means is None:
        return weights
    for name in layout.parts(plan.target):
        if name.endswith(".bias"):
            weight, layer = origins[f"{name.removesuffix('bias')}weight"]
            if layer is not None and (name not in origins or weight.axes[1] in AXES):
                weights[name] = weight, layer
    return weights
