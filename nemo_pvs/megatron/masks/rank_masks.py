"""Masks as a training rank needs them: one bit per weight that it holds, sliced from the masks of the whole model.

The masks come from the initial checkpoint, under Hugging Face names and for whole matrices, whatever the layout; so a
run that resumes at another tensor, pipeline or data parallelism slices them again, and nothing has to be re-sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from nemo_pvs.checkpoints.masks import masks_of, pack, unpack
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Entry, Layout

# Bytes of a mask that are unpacked at a time: 2 Mi weights, so that this takes 8 MiB however large a matrix is.
_CHUNK = 1 << 18


class PackedMask:
    """One bit for each weight of a flat fp32 tensor: 1 if it is kept."""

    def __init__(self, kept: torch.Tensor, device: torch.device | str = "cpu") -> None:
        """Pack ``kept``, bool of any size on the CPU, read in row-major order, and hold it on ``device``."""
        self.bits = pack(kept.flatten()).to(device)
        self.weights = kept.numel()

    def zero_pruned(self, values: torch.Tensor) -> None:
        """Set the pruned ones among ``values`` to +0 in place.

        This is a bitwise AND with all ones or all zeros. Unlike a product, it also clears infinities and NaNs.

        Args:
            values: Contiguous fp32 tensor with one value per weight.

        Raises:
            ValueError: ``values`` has another number of elements.
        """
        for part, words in self._chunks(values):
            part.view(torch.int32).bitwise_and_(words)

    def broken(self, values: torch.Tensor) -> int:
        """Return how many pruned ones among ``values``, of any dtype, are not zero."""
        return sum(int(((words == 0) & (part != 0)).sum()) for part, words in self._chunks(values))

    def _chunks(self, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield pieces of ``values`` with int32 words: -1 (all ones) where a weight is kept, and 0 elsewhere."""
        flat = values.detach().view(-1)
        if flat.numel() != self.weights:
            raise ValueError(f"A mask of {self.weights} weights does not fit {flat.numel()} values.")
        table = _words_of_bytes(flat.device)
        for first in range(0, len(self.bits), _CHUNK):
            part = flat[8 * first : 8 * (first + _CHUNK)]
            words = table.index_select(0, self.bits[first : first + _CHUNK].int()).view(-1)
            yield part, words[: len(part)]


@cache
def _words_of_bytes(device: torch.device) -> torch.Tensor:
    """Return int32 [256, 8]: the words of the eight weights of every possible byte of packed bits."""
    return -unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(1), 8).int().to(device)


class RankMasks:
    """The masks of the Megatron tensors of one tensor parallel rank."""

    def __init__(self, source: WeightSource, *, rank: int = 0, ranks: int = 1) -> None:
        """Find the masked tensors of a model, without reading masks yet.

        Args:
            source: The model, with masks.
            rank: Tensor parallel rank.
            ranks: Tensor parallel size; it divides KV groups and ffn (``Shape.check_parallel``).

        Raises:
            UserError: a tensor that is not a matrix of a decoder layer has a mask.
        """
        self._masks = masks_of(source)
        self._names = frozenset(self._masks.names)
        self._shape = shape_of(source)
        self._rank, self._ranks = rank, ranks
        self.entries: dict[tuple[int, str], Entry] = {}
        """Masked tensors by layer, from 0 over all pipeline stages, and Megatron name within the layer."""
        parts = Layout.for_config(source.config).parts(self._shape)
        for name in self._masks.names:
            part, entry = parts[name]
            if entry.layer is None or len(part.axes) != 2:
                raise UserError(
                    f"{name} has a mask, but training supports masks only for the matrices of decoder layers; "
                    "leave embeddings, output head, norms and biases dense."
                )
            self.entries[entry.layer, entry.megatron] = entry

    def read(self, entry: Entry) -> torch.Tensor:
        """Return the mask of this rank's slice of a Megatron tensor, bool; True for weights that are kept.

        Parts without a mask are all True.
        """
        parts = [
            self._masks.read(part.name) if part.name in self._names else torch.ones(part.size(self._shape)).bool()
            for part in entry.parts
        ]
        return entry.join_rank(parts, self._shape, self._rank, self._ranks)
