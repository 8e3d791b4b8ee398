"""Reads the AdamW state of a training checkpoint like the weights that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from nemo_pvs.checkpoints.fingerprint import compute_checksums
from nemo_pvs.checkpoints.masks import Masks, NoMasks
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.tensor_record import TensorRecord
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Entry, Layout

MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second moment of the gradient, as named by Megatron's optimizers."""
MASTERS = ("param", "fp32_param")
"""fp32 copies of bf16 weights, in Megatron's distributed and in its plain optimizer."""


class OptimizerStateSource(NemoSource):
    """One state of an optimizer in a NeMo checkpoint: a tensor for each weight, of its size and under its name.

    Megatron stores a state like the weight (fused, all layers in one tensor, independent of the ranks that wrote it,
    even with the distributed optimizer), so it is split in the same way.
    """

    def __init__(self, folder: str | Path, state: str) -> None:
        """Open the checkpoint; no tensor is read yet.

        Args:
            folder: The checkpoint, with ``weights/`` and ``context/``.
            state: One of ``MOMENTS`` or ``MASTERS``.

        Raises:
            UserError: the checkpoint has no such state, or its sizes are not those of the weights.
        """
        self.state = state
        super().__init__(folder)
        self._stored.manifest = None  # it describes the weights
        self._weights.check_crc = True

    def checksums(self) -> Mapping[str, TensorRecord]:
        """Compute the checksum of every tensor; the known checksums are those of the weights."""
        return compute_checksums(self)

    @cached_property
    def masks(self) -> Masks:
        """No masks: they belong to the weights."""
        return NoMasks()

    def _name(self, entry: Entry) -> str:
        return f"optimizer.state.{self.state}.{super()._name(entry)}"

    def _check_sizes(self, layout: Layout) -> None:
        stored = set(self._weights.names)
        missing = [name for name in map(self._name, layout.entries(self._shape)) if name not in stored]
        if missing:
            raise UserError(
                f"{self.folder} has no {missing[0]}, so its optimizer state cannot be carried over; give a checkpoint "
                "that training saved with its optimizer, or restart the optimizer."
            )
        super()._check_sizes(layout)

    def _refuse_unknown_tensors(self) -> None:
        """Accept everything: ``NemoSource`` checks the other tensors."""


def states_in(checkpoint: NemoSource) -> tuple[str, ...]:
    """Return the states to read from a checkpoint: both moments, and the fp32 weights if it has them."""
    stored = checkpoint.extra_tensors
    states = list(MOMENTS)
    for name in MASTERS:
        if any(tensor.startswith(f"optimizer.state.{name}.") for tensor in stored):
            states.append(name)
    return tuple(states)
