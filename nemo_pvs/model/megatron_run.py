"""The folder of a run of Megatron-LM or Megatron-Bridge, which has a folder for each checkpoint."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
"""The file that names the run's latest checkpoint: an iteration number, or ``release``."""


def iteration_folder(iteration: int) -> str:
    """Return the folder name of the checkpoint of an iteration."""
    return f"iter_{iteration:07d}"


def latest_checkpoint(folder: Path) -> Path:
    """Return the folder of a run's latest checkpoint; ``folder`` itself if it is not the folder of a run.

    Raises:
        UserError: the run names a checkpoint that does not exist.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    last = tracker.read_text(errors="replace").strip()
    name = iteration_folder(int(last)) if last.isdecimal() else last
    checkpoint = folder / name
    if checkpoint.parent != folder or not checkpoint.is_dir():
        raise UserError(f"{tracker} names {name or 'nothing'}, which does not exist; give the checkpoint's folder.")
    return checkpoint
