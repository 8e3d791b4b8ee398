"""How far pruning while training has come: which units are left, and what has been summed up about them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.learned.unit_space import UnitSpace


@dataclass
class KeptUnits:
    """The state beside weights and optimizer; the same on every rank."""

    kept: torch.Tensor
    """bool [size] of a ``UnitSpace``, on the CPU."""
    totals: torch.Tensor
    """Averages over steps of the sums of ``w g`` and of ``(w g)^2`` of each unit, float64 [2, size]."""
    removals: list[dict[str, Any]] = field(default_factory=list)
    """What has gone, in order: ``step``, ``kind``, ``units`` (how many), ``parameters`` left, ``saliency``."""

    @classmethod
    def everything(cls, space: UnitSpace) -> KeptUnits:
        """Return the state before anything was measured or removed."""
        return cls(space.everything(), torch.zeros(2, space.size, dtype=torch.float64))

    def save(self, path: Path) -> None:
        """Write it whole or not at all, as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        tensors = {"kept": self.kept, "totals": self.totals.cpu()}
        save_file(tensors, partial, {"removals": json.dumps(self.removals)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, space: UnitSpace) -> KeptUnits:
        """Read what ``save`` wrote.

        Raises:
            UserError: it is not there, or of another model.
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
            raise UserError(f"{path} is about {len(state.kept)} units, but this model has {space.size}.")
        return state


def state_file(run: Path, steps: int) -> Path:
    """Return the file that goes with the checkpoint after ``steps`` steps of the run in a folder."""
    return run / "kept_units" / f"step={steps}.safetensors"
