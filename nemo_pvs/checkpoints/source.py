"""WeightSource: what every checkpoint format and every transform of one looks like to its reader."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_pvs.files import sha256_json
from nemo_pvs.layout import Layout
from nemo_pvs.shape import Shape


class WeightSource(Protocol):
    """A model whose tensors are read one at a time under their Hugging Face names.

    Pruning wraps one source in another, and writers pull from whatever they are given, so no step holds a model.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face ``config.json`` of the model."""

    @property
    def assets(self) -> tuple[Path, ...]:
        """Files that travel along: tokenizer, chat template, generation config."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in the stored dtype; ``name`` is complete (``model.layers.3.mlp.up_proj.weight``)."""


def shape_of(source: WeightSource) -> Shape:
    """Return the Shape of a source's model."""
    return Layout.for_config(source.config).shape(source.config)


def fingerprint(source: WeightSource) -> str:
    """Return a SHA-256 that names the model whatever its format: the same for HF and NeMo copies of it.

    Covers the shape, every vector, and the matrices of the first, middle and last decoder layers: enough to tell any
    two trained or pruned models apart without reading all of a large one.
    """
    shape = shape_of(source)
    digest = hashlib.sha256(sha256_json(shape.to_dict()).encode())
    sampled = {0, shape.layers // 2, shape.layers - 1}
    for name, (part, entry) in Layout.for_config(source.config).parts(shape).items():
        if len(part.axes) == 1 or entry.layer in sampled:
            tensor = source.read(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
