"""WeightSource: the interface of every checkpoint format and of every transform of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape

Progress = Callable[[int, int], None]
"""Called with (done, total), both in parameters."""


class WeightSource(Protocol):
    """A model whose tensors are read one at a time under their Hugging Face names.

    Pruning wraps one source in another, and writers pull tensors from any source, so no step holds a whole model.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face ``config.json`` of the model."""

    @property
    def assets(self) -> tuple[Path, ...]:
        """Files to copy along: tokenizer, chat template, generation config."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in the stored dtype; ``name`` is its full name (``model.layers.3.mlp.up_proj.weight``)."""


def shape_of(source: WeightSource) -> Shape:
    """Return the Shape of a source's model."""
    return Layout.for_config(source.config).shape(source.config)
