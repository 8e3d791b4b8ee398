"""AdamW's state in a checkpoint of training, read like the weights that it belongs to."""

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
"""Of the gradient and of its square, as Megatron's optimizers name them."""
MASTERS = ("param", "fp32_param")
"""fp32 copies of bf16 weights: those of Megatron's distributed optimizer, and of its plain one."""


class OptimizerStateSource(NemoSource):
    """One of an optimizer's states in a NeMo checkpoint: for each weight a tensor of its size, under its name.

    Megatron stores a state as it stores the weight (fused, all layers in one, whatever ranks wrote it, with its
    distributed optimizer, too), so it is taken apart the same way.
    """

    def __init__(self, folder: str | Path, state: str) -> None:
        """Open the checkpoint; no tensor is read yet.

        Args:
            folder: With ``weights/`` and ``context/``.
            state: One of ``MOMENTS`` or ``MASTERS``.

        Raises:
            UserError: training left no such state here, or it is not of the weights' sizes.
        """
        self.state = state
        super().__init__(folder)
        self._stored.manifest = None  # it is of the weights
        self._weights.check_crc = True

    def checksums(self) -> Mapping[str, TensorRecord]:
        """Return the checksum of every tensor, computed: those that are known are of the weights."""
        return compute_checksums(self)

    @cached_property
    def masks(self) -> Masks:
        """None: masks are for the weights."""
        return NoMasks()

    def _name(self, entry: Entry) -> str:
        return f"optimizer.state.{self.state}.{super()._name(entry)}"

    def _check_sizes(self, layout: Layout) -> None:
        stored = set(self._weights.names)
        missing = [name for name in map(self._name, layout.entries(self._shape)) if name not in stored]
        if missing:
            raise UserError(
                f"{self.folder} has no {missing[0]}, so the optimizer's state cannot be carried on from it; give a "
                "checkpoint that training saved with its optimizer, or restart the optimizer."
            )
        super()._check_sizes(layout)

    def _refuse_unknown_tensors(self) -> None:
        """What else is stored is for ``NemoSource`` to judge."""


def states_in(checkpoint: NemoSource) -> tuple[str, ...]:
    """Return the states that a checkpoint must be asked for: both moments, and the fp32 weights that it may have."""
    stored = checkpoint.extra_tensors
    return *MOMENTS, *(
        name for name in MASTERS if any(found.startswith(f"optimizer.state.{name}.") for found in stored)
    )
