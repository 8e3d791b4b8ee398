"""State of pruning during training: the units kept so far and their accumulated saliency."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.learned.unit_space import UnitSpace
from nemo_pvs.system.files import write_bytes


@dataclass
class KeptUnits:
    """Pruning state in addition to weights and optimizer; the same on every rank."""

    kept: torch.Tensor
    """Kept units of a ``UnitSpace``, bool [size], on the CPU."""
    totals: torch.Tensor
    """Averages over steps of each unit's sums of ``w g`` and of ``(w g)^2``, float64 [2, size]."""
    removals: list[dict[str, Any]] = field(default_factory=list)
    """Removals in order: ``step``, ``kind``, ``units`` (their number), ``parameters`` left, ``saliency``."""

    @classmethod
    def everything(cls, space: UnitSpace) -> KeptUnits:
        """Return the initial state, before anything is measured or removed."""
        return cls(space.everything(), torch.zeros(2, space.size, dtype=torch.float64))

    def save(self, path: Path) -> None:
        """Write the state atomically, as safetensors."""
        tensors = {"kept": self.kept, "totals": self.totals.cpu()}
        write_bytes(path, save(tensors, {"removals": json.dumps(self.removals)}))

    @classmethod
    def load(cls, path: Path, space: UnitSpace) -> KeptUnits:
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is missing or damaged, or belongs to another model.
        """
        try:
            with safe_open(path, "pt") as file:
                state = cls(
                    file.get_tensor("kept"), file.get_tensor("totals"), json.loads(file.metadata()["removals"])
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, which says what pruning has removed, cannot be read ({error}); remove the run's folder and "
                "start it again."
            ) from None
        if len(state.kept) != space.size:
            raise UserError(f"{path} records {len(state.kept)} units, but this model has {space.size}.")
        return state


def state_file(run: Path, steps: int) -> Path:
    """Return the state file that belongs to the checkpoint after ``steps`` steps in a run's folder."""
    return run / "kept_units" / f"step={steps}.safetensors"
