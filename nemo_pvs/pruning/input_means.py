"""Mean inputs of removed channels, with which a plan compensates for them by a bias (FLAP, 2312.11983)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from nemo_pvs.errors import UserError
from nemo_pvs.system.files import sha256_bytes, sha256_json, write_bytes

FEATURES = frozenset({"attention_bias", "mlp_bias"})
"""The features of a Shape that stand for the biases."""

AXES = ("query", "ffn")
"""Layout axes whose removed channels have means."""


@dataclass(frozen=True, eq=False)
class InputMeans:
    """Means over the calibration tokens, fp32, of the channels that a plan removes, in the parent's order.

    A linear module W [d, inputs] that loses inputs gets ``b = W[:, removed] mean[removed]`` [d], which preserves the
    mean of its output.
    The vectors are stored in a safetensors file next to the plan's JSON file, which records their hash.
    """

    query: tuple[torch.Tensor, ...]
    """Removed inputs of ``o_proj`` in each kept layer."""
    ffn: tuple[torch.Tensor, ...]
    """Removed inputs of ``down_proj`` in each kept layer."""

    @classmethod
    def of(cls, query: Sequence[torch.Tensor], ffn: Sequence[torch.Tensor]) -> InputMeans:
        """Return the means, cast to fp32."""
        return cls(*(tuple(row.float().contiguous() for row in rows) for rows in (query, ffn)))

    def at(self, axis: str, layer: int) -> torch.Tensor:
        """Return the means of the channels removed from an axis (query or ffn) of a layer of the pruned model."""
        rows: tuple[torch.Tensor, ...] = getattr(self, axis)
        return rows[layer]

    def counts(self, axis: str) -> list[int]:
        """Return how many channels each layer loses along an axis, query or ffn."""
        return [len(row) for row in getattr(self, axis)]

    @cached_property
    def content_hash(self) -> str:
        """A SHA-256 of the vectors and their names."""
        return sha256_json({name: sha256_bytes(row.numpy().tobytes()) for name, row in self._rows().items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InputMeans) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def save(self, path: Path) -> None:
        """Write the vectors atomically."""
        write_bytes(path, save(self._rows()))

    @classmethod
    def load(cls, path: Path, content_hash: str) -> InputMeans:
        """Read the vectors that ``save`` wrote.

        Raises:
            UserError: the file is missing or damaged, or does not have this hash.
        """
        try:
            means = cls._from_rows(load_file(path))
        except (FileNotFoundError, SafetensorError, KeyError):
            means = None
        if means is None or means.content_hash != content_hash:
            raise UserError(f"{path}, which belongs to the plan next to it, is missing or damaged; plan again.")
        return means

    def _rows(self) -> dict[str, torch.Tensor]:
        return {f"{axis}.{layer}": row for axis in AXES for layer, row in enumerate(getattr(self, axis))}

    @classmethod
    def _from_rows(cls, rows: Mapping[str, torch.Tensor]) -> InputMeans:
        layers = len(rows) // len(AXES)
        return cls(*(tuple(rows[f"{axis}.{layer}"] for layer in range(layers)) for axis in AXES))
