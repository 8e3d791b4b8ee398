"""Randomly initialised weights as a source: the scratch baseline's initial checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.masks import Masks, NoMasks
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.checkpoints.transforms.initialisation import Initialisation, distribution
from nemo_pvs.model.layout import Entry, Layout, Part


class RandomSource:
    """A model drawn at random, the same on every layout and machine.

    Matrices are distributed as ``initialisation.distribution`` says; norms are one, biases zero. Each tensor has a
    generator of its own, seeded by the seed and its name, so that tensors can be read in any order.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        seed: int,
        assets: tuple[Path, ...] = (),
        dtype: torch.dtype = torch.float32,
        masks: Masks | None = None,
        keep: WeightSource | None = None,
        initialisation: Initialisation = "megatron",
    ) -> None:
        """Prepare; a tensor is drawn when it is read.

        Args:
            config: Hugging Face config of the model.
            seed: Another seed, other weights.
            assets: Tokenizer and other files that travel along.
            dtype: Of every tensor.
            masks: Of the sparse model that this is the baseline of: drawn weights are zero under them, too.
            keep: Model whose embedding and vectors (norms, biases) stay as they are, as the scratch baseline of the
                code published with 2606.14150 does; a parent's embedding makes it a weaker baseline.
            initialisation: How matrices are distributed.
        """
        self.config = config
        self.assets = assets
        self.masks = masks or NoMasks()
        self._seed = seed
        self._dtype = dtype
        self._keep = keep
        self._initialisation: Initialisation = initialisation
        self._masked = frozenset(self.masks.names)
        self._shape = Layout.for_config(config).shape(config)
        self._parts = Layout.for_config(config).parts(self._shape)

    def read(self, name: str) -> torch.Tensor:
        """Draw one tensor, or take it from the model to keep."""
        part, entry = self._parts[name]
        if self._keep is not None and (len(part.axes) == 1 or entry.megatron.startswith("embedding.")):
            return self._keep.read(name).to(self._dtype)
        weight = self._draw(name, part, entry)
        return weight.masked_fill_(~self.masks.read(name), 0) if name in self._masked else weight

    def _draw(self, name: str, part: Part, entry: Entry) -> torch.Tensor:
        size = part.size(self._shape)
        if len(size) == 1:
            return torch.full(size, 0.0 if name.endswith(".bias") else 1.0, dtype=self._dtype)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn_from = distribution(self._initialisation, part, entry, self._shape, self.config)
        return drawn_from.draw(size, generator).to(self._dtype)
