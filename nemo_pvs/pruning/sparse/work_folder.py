"""The work folder of layer-by-layer pruning, from which a killed run resumes after the last finished layer.

The folder holds the pruned matrices of each finished layer (``pruned_layers.py``), the hidden states before the next
layer, one file per rank, and a record, written last, of how many layers are finished.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.sparse.pruned_layers import PrunedMatrices, write_layer
from nemo_pvs.system import ranks
from nemo_pvs.system.files import disk_errors, read_json, write_json

_RECORD = "record.json"


def work_folder(target: Path) -> Path:
    """Return the folder next to ``target`` in which its layers are pruned."""
    return target.with_name(f".{target.name}.pruning")


class WorkFolder:
    """The work folder of one pruning; ranks share it, or each has its own if they share no disk."""

    def __init__(self, path: Path, layers: int, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        """Open the folder, or create it.

        Args:
            path: The folder.
            layers: Layers of the model.
            settings: Everything that the result depends on; JSON.
            overwrite: Start over if the folder belongs to other settings.

        Raises:
            UserError: the folder belongs to a pruning with other settings, holds something else, or cannot be written.
        """
        self.path = path
        self._settings = settings
        record = self._read_record(overwrite)
        ranks.barrier()  # no rank writes before all have read
        with disk_errors(path):
            if record is None and ranks.is_main():
                shutil.rmtree(path, ignore_errors=True)
            ranks.barrier()
            path.mkdir(parents=True, exist_ok=True)
        self.layers_done = self._common_progress(record["layers_done"] if record else 0, layers)
        self._write_record()

    def _read_record(self, overwrite: bool) -> dict[str, Any] | None:
        """Return the record of a pruning to resume, or None to start from the beginning."""
        if not self.path.exists():
            return None
        if not (self.path / _RECORD).is_file():
            if any(self.path.iterdir()):
                raise UserError(f"{self.path} holds something other than a pruning; choose another work folder.")
            return None
        record: dict[str, Any] = read_json(self.path / _RECORD)
        if record["settings"] == self._settings:
            return record
        if record["layers_done"] and not overwrite:
            names = sorted(self._settings.keys() | record["settings"].keys())
            differing = [name for name in names if record["settings"].get(name) != self._settings.get(name)]
            raise UserError(
                f"{self.path} holds an interrupted pruning with another {', '.join(differing)}; "
                "finish it with its original command, remove the folder, or pass --overwrite."
            )
        return None

    def _common_progress(self, layers_done: int, layers: int) -> int:
        """Return the main rank's number of finished layers, or 0 if another rank lacks its states after them."""
        count = int(ranks.all_reduce(torch.tensor(layers_done if ranks.is_main() else 0)))
        lacking = 0 < count < layers and not self._states_file(count).is_file()
        return 0 if int(ranks.all_reduce(torch.tensor(int(lacking)))) else count

    def __enter__(self) -> WorkFolder:
        """Return the folder."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the folder if a user's mistake ended the pruning before its first layer was finished."""
        if kind is UserError and self.layers_done == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def states(self, layer: int, size: tuple[int, ...], dtype: torch.dtype, *, new: bool = False) -> torch.Tensor:
        """Return this rank's hidden states [n, S, d] before a layer.

        They are mapped from a file: the operating system keeps what fits in memory and writes back the rest.

        Args:
            layer: Index of the layer.
            size: Size of the states.
            dtype: Dtype of the states.
            new: Create the file; it is valid once the layer before is finished.

        Raises:
            UserError: the disk is full.
        """
        file = self._states_file(layer)
        count = torch.Size(size).numel()
        if new:
            with disk_errors(file), open(file, "wb") as handle:
                # Without allocated blocks, a write to a mapped page on a full disk would kill the process.
                os.posix_fallocate(handle.fileno(), 0, count * dtype.itemsize)
        return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(size)

    def finish_layer(self, layer: int, matrices: PrunedMatrices) -> None:
        """Save a finished layer: its matrices, the states after it (unless it is the last), then the record."""
        file = self._states_file(layer + 1)
        if file.is_file():
            with disk_errors(file), open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        if ranks.is_main():
            write_layer(self.path, layer, matrices)
        ranks.barrier()  # all ranks have written their states
        self.layers_done = layer + 1
        self._write_record()
        ranks.barrier()  # no rank needs the old states any more
        self._states_file(layer).unlink(missing_ok=True)

    @property
    def record(self) -> dict[str, Any]:
        """The settings, and how many layers are finished."""
        return {"settings": self._settings, "layers_done": self.layers_done}

    def _write_record(self) -> None:
        if ranks.is_main():
            write_json(self.path / _RECORD, self.record)

    def _states_file(self, layer: int) -> Path:
        return self.path / f"states-before-{layer:05d}-rank-{ranks.rank()}-of-{ranks.world_size()}"
