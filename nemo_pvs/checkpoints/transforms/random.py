"""Randomly initialised weights as a source: the initial checkpoint of the scratch baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.masks import Masks, NoMasks
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.checkpoints.transforms.initialisation import InitialisationScheme, distribution
from nemo_pvs.model.layout import Entry, Layout, TensorPart


class RandomSource:
    """A randomly initialised model, the same on every layout and machine.

    Matrices follow ``initialisation.distribution``; norms are 1, biases 0. Each tensor has its own generator, seeded
    with the seed and the tensor's name, so tensors can be read in any order.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        seed: int,
        assets: tuple[Path, ...] = (),
        dtype: torch.dtype = torch.float32,
        masks: Masks | None = None,
        keep: WeightSource | None = None,
        initialisation: InitialisationScheme = "megatron",
    ) -> None:
        """Prepare; a tensor is drawn when it is read.

        Args:
            config: Hugging Face config of the model.
            seed: Seed of the weights.
            assets: Tokenizer and other files to copy along.
            dtype: Dtype of every tensor.
            masks: Masks of the sparse model that this is a baseline for: pruned weights are set to zero.
            keep: Model whose embedding and vectors (norms, biases) are kept, as in the code published with arXiv
                2606.14150; a parent's embedding makes it a weaker baseline.
            initialisation: Initialisation scheme of the matrices.
        """
        self.config = config
        self.assets = assets
        self.masks = masks or NoMasks()
        self._seed = seed
        self._dtype = dtype
        self._keep = keep
        self._initialisation: InitialisationScheme = initialisation
        self._masked = frozenset(self.masks.names)
        self._shape = Layout.for_config(config).shape(config)
        self._parts = Layout.for_config(config).parts(self._shape)

    def read(self, name: str) -> torch.Tensor:
        """Draw a tensor, or read it from the model to keep."""
        part, entry = self._parts[name]
        if self._keep is not None and (len(part.axes) == 1 or entry.megatron.startswith("embedding.")):
            return self._keep.read(name).to(self._dtype)
        weight = self._draw(name, part, entry)
        return weight.masked_fill_(~self.masks.read(name), 0) if name in self._masked else weight

    def _draw(self, name: str, part: TensorPart, entry: Entry) -> torch.Tensor:
        size = part.size(self._shape)
        if len(size) == 1:
            return torch.full(size, 0.0 if name.endswith(".bias") else 1.0, dtype=self._dtype)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn_from = distribution(self._initialisation, part, entry, self._shape, self.config)
        return drawn_from.draw(size, generator).to(self._dtype)
