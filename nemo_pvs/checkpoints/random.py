"""Randomly initialised weights as a source: the scratch baseline's initial checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.layout import Layout


class RandomSource:
    """A model drawn as Megatron draws it, the same on every layout and machine.

    Matrices are normal with standard deviation ``initializer_range``; those that write into the residual stream
    (attention output, MLP down) are divided by ``sqrt(2 L)`` as in GPT-2 and Megatron; norms are one, biases
    zero. Each tensor has a generator of its own, seeded by the seed and its name, so that tensors can be read in any
    order.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        seed: int,
        assets: tuple[Path, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.assets = assets
        self._seed = seed
        self._dtype = dtype
        self._shape = Layout.for_config(config).shape(config)
        self._parts = Layout.for_config(config).parts(self._shape)

    def read(self, name: str) -> torch.Tensor:
        """Draw one tensor."""
        part, entry = self._parts[name]
        size = part.size(self._shape)
        if len(size) == 1:
            return torch.full(size, 0.0 if name.endswith(".bias") else 1.0, dtype=self._dtype)
        deviation = float(self.config.get("initializer_range", 0.02))
        if entry.layer is not None and part.axes[0] == "hidden":
            deviation /= (2 * self._shape.layers) ** 0.5
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(size).normal_(0, deviation, generator=generator).to(self._dtype)
