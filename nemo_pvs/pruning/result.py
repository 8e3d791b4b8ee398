"""The result of a pruning method: a model that is not written yet, and writing it with a record of how it was made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.huggingface.folder import write_huggingface
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.checkpoints.transforms.pad import pad_layers
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.sparse.pruned_layers import SparseSource
from nemo_pvs.system.files import write_json

PLAN = "pvs_plan.json"
"""The file in a pruned checkpoint that records what was kept of the parent."""
SETTINGS = "pvs_pruning.json"
"""The file in a sparse checkpoint that records how it was made."""


@dataclass(frozen=True)
class Pruned:
    """A pruned model, not written yet."""

    source: WeightSource
    plan: Plan | None
    """None for sparse models, which are described by their masks."""
    settings: Mapping[str, Any]


def write(
    pruned: Pruned,
    target: Path,
    to: str,
    *,
    pad: bool = False,
    ledger: Ledger | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a pruned model with a record of how it was made, and remove the work folder kept for resuming.

    Args:
        pruned: The model.
        target: The folder to create.
        to: hf or nemo.
        pad: Pad uneven layers with zeros to even ones, so that stock classes load the model.
        ledger: What the model has cost, kept next to it.
        overwrite: Replace an existing ``target``.
        progress: Called with (done, total) parameters.

    Raises:
        UserError: ``target`` exists or cannot be written.
    """
    source = pad_layers(pruned.source) if pad else pruned.source
    writer = write_huggingface if to == "hf" else write_nemo

    def complete(folder: Path) -> None:
        if pruned.plan:
            pruned.plan.save(folder / PLAN)
        else:
            write_json(folder / SETTINGS, dict(pruned.settings))
        if ledger:
            ledger.save(folder / LEDGER)

    writer(source, target, overwrite=overwrite, progress=progress, before_rename=complete)
    if isinstance(pruned.source, SparseSource):
        shutil.rmtree(pruned.source.folder)
