"""Masks of sparse models: one bit per weight, stored separately, that says whether the weight is pruned.

An exact zero need not be a pruned weight, and a pruned weight must stay zero while the others are trained; so the mask
is made when a model is pruned and stays with it: as ``masks.safetensors`` in a Hugging Face folder, named in its
config.json, or in the context of a NeMo checkpoint. Bits are packed along the last axis, eight weights per byte, the
first weight in the highest bit; 1 means that the weight is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from nemo_pvs.checkpoints.files.safetensors_file import PACKED_BITS, SafetensorsReader, SafetensorsWriter
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.errors import UserError

FILE = "masks.safetensors"
CONFIG_KEY = "sparsity_masks"
"""The key of a Hugging Face config.json that names the file."""


class Masks(Protocol):
    """The masks of a model, by the Hugging Face name of the weight."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights that have a mask; all others are dense."""

    def read(self, name: str) -> torch.Tensor:
        """Return a mask, bool, of the weight's size; True means that the weight is kept."""


class NoMasks:
    """A dense model."""

    names: tuple[str, ...] = ()

    def read(self, name: str) -> torch.Tensor:
        """Raise KeyError: no weight has a mask."""
        raise KeyError(name)


class MaskFile:
    """Masks in a file, read one at a time."""

    def __init__(self, path: Path, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Read the header.

        Args:
            path: The file.
            sizes: The size of every weight of the model.

        Raises:
            UserError: the file is missing or damaged, or belongs to another model.
        """
        self._file = SafetensorsReader(path, dtypes=PACKED_BITS)
        self._sizes = sizes
        for name in self.names:
            size = sizes.get(name, ())
            if self._file.size(name) != (*size[:-1], -(-size[-1] // 8) if size else 0):
                raise UserError(f"The mask of {name} in {path} does not fit the model; prune the model again.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights that have a mask."""
        return tuple(self._file.names)

    def read(self, name: str) -> torch.Tensor:
        """Return a mask, bool, of the weight's size.

        Raises:
            UserError: the file is truncated.
        """
        return unpack(self._file.read(name), self._sizes[name][-1])


def masks_of(source: object) -> Masks:
    """Return the masks of a source; most models have none."""
    masks: Masks = getattr(source, "masks", NoMasks())
    return masks


def check_masks(source: WeightSource) -> None:
    """Read every masked weight and check that it is zero where its mask says pruned.

    Raises:
        UserError: a pruned weight is not zero.
    """
    masks = masks_of(source)
    for name in masks.names:
        broken = int((source.read(name)[~masks.read(name)] != 0).sum())
        if broken:
            raise UserError(
                f"{broken:,} weights of {name} are not zero although its mask says that they are pruned; "
                "the masks belong to another model, so prune again or use the file that belongs to these weights."
            )


def write_masks(masks: Masks, path: Path, names: Iterable[str] | None = None) -> None:
    """Write masks into one file, one in memory at a time.

    Args:
        masks: The masks.
        path: The file; it must not exist.
        names: The weights whose masks to write, in this order; all of them by default.
    """
    wanted = tuple(names if names is not None else masks.names)
    file = SafetensorsWriter(path, wanted)
    for name in wanted:
        file.write(name, pack(masks.read(name)))
    file.finish()


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Return a bool mask [..., n] as bytes, uint8 [..., ceil(n / 8)]."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Undo ``pack``: return a bool mask [..., columns] from bytes, uint8 [..., ceil(columns / 8)]."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=columns)).bool()
