"""A model that was pruned layer by layer: its matrices come from a folder, everything else from the parent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.files.safetensors_file import SafetensorsReader, SafetensorsWriter
from nemo_pvs.checkpoints.masks import MaskFile, pack
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.model.layout import Layout
from nemo_pvs.system.files import whole_folder

PrunedMatrices = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""The pruned matrix and its mask (bool, true for kept weights) by Hugging Face name."""

_WEIGHTS = "weights.safetensors"
_MASKS = "masks.safetensors"


class SparseSource:
    """A sparse model as a source of tensors and masks; holds only file headers in memory."""

    def __init__(self, source: WeightSource, folder: Path, record: Mapping[str, Any]) -> None:
        """Read pruned matrices that ``write_layer`` wrote from ``folder``, and the rest from ``source``.

        Args:
            source: The dense model.
            folder: Holds the pruned matrices of every layer; remove it when the model has been written elsewhere.
            record: Record of how they were made.
        """
        self.folder = folder
        self.record = record
        self._source = source
        self._layers: dict[str, int] = {}
        shape = shape_of(source)
        self._sizes: dict[int, dict[str, tuple[int, ...]]] = {layer: {} for layer in range(shape.layers)}
        for name, (part, entry) in Layout.for_config(source.config).parts(shape).items():
            if entry.layer is not None and len(part.axes) == 2:
                self._layers[name] = entry.layer
                self._sizes[entry.layer][name] = part.size(shape)
        self.masks = _LayerMasks(self)

    @property
    def config(self) -> Mapping[str, Any]:
        """The parent's: sparsity changes no size."""
        return self._source.config

    @property
    def assets(self) -> tuple[Path, ...]:
        """The parent's tokenizer and other files."""
        return self._source.assets

    @property
    def pruned_names(self) -> tuple[str, ...]:
        """Names of the matrices that were pruned."""
        return tuple(self._layers)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in the parent's dtype."""
        if name not in self._layers:
            return self._source.read(name)
        return SafetensorsReader(layer_folder(self.folder, self._layers[name]) / _WEIGHTS).read(name)

    def read_mask(self, name: str) -> torch.Tensor:
        """Return the mask of a pruned matrix, bool [outputs, inputs]."""
        layer = self._layers[name]
        return MaskFile(layer_folder(self.folder, layer) / _MASKS, self._sizes[layer]).read(name)


class _LayerMasks:
    """The masks of a SparseSource (``checkpoints.masks.Masks``)."""

    def __init__(self, source: SparseSource) -> None:
        self.names = source.pruned_names
        self.read = source.read_mask


def layer_folder(folder: Path, layer: int) -> Path:
    """Return the folder with the matrices of a layer."""
    return folder / f"layer-{layer:05d}"


def write_layer(folder: Path, layer: int, matrices: PrunedMatrices) -> None:
    """Write the pruned matrices of a layer and their masks, atomically.

    Raises:
        UserError: they cannot be written.
    """
    with whole_folder(layer_folder(folder, layer), overwrite=True) as partial:
        weights, masks = (SafetensorsWriter(partial / file, matrices) for file in (_WEIGHTS, _MASKS))
        for name, (weight, kept) in matrices.items():
            weights.write(name, weight.cpu())
            masks.write(name, pack(kept.cpu()))
        weights.finish()
        masks.finish()
