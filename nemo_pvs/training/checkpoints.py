"""The checkpoints of a run: which there are, and the newest that can be trusted. Imports no NeMo.

A run keeps two. A save is declared finished only when every rank has written its part, but a file system that fills
up, or loses what it had promised to keep, can still leave the newest one cut short; then the one before goes on.
"""

from __future__ import annotations

import re
from pathlib import Path

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.errors import UserError

KEPT = 2
"""Checkpoints on disk, the newest ones; while one is being written there is one more."""

_NAME = re.compile(r"step=(\d+)-last")
_UNFINISHED = "-unfinished"  # NeMo's marker beside a checkpoint that is being written or removed


def checkpoint_name(steps: int) -> str:
    """Return the folder of the checkpoint after ``steps`` steps; Lightning names it by the last step, from 0."""
    return f"step={steps - 1}-last"


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a run's folder of checkpoints, the newest first."""
    steps = {path: int(name[1]) for path in folder.glob("step=*") if (name := _NAME.fullmatch(path.name))}
    finished = [path for path in steps if not path.with_name(path.name + _UNFINISHED).exists()]
    return sorted(finished, key=lambda path: steps[path], reverse=True)


def damage(checkpoint: Path) -> str | None:
    """Return what keeps a checkpoint from being read, or None. Compares sizes; the data themselves are not read."""
    for part in ("context/io.json", "weights/common.pt", "weights/metadata.json"):
        file = checkpoint / part
        if not file.is_file() or not file.stat().st_size:
            return f"{part} is missing or empty"
    try:
        truncated = TorchDistReader(checkpoint / "weights").truncated_files()
    except UserError as error:
        return str(error)
    return f"{', '.join(truncated[:3])} cut short or missing, {len(truncated)} in all" if truncated else None


def newest_sound(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint that is whole, and the newer ones that are not, each with what is wrong."""
    broken: dict[Path, str] = {}
    for checkpoint in saved_checkpoints(folder):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, broken
        broken[checkpoint] = problem
    return None, broken


def state_to_carry(folder: Path) -> Path:
    """Return the checkpoint whose optimizer state another run goes on with.

    Raises:
        UserError: there is none that is whole.
    """
    checkpoint, _ = newest_sound(folder)
    if checkpoint is None:
        target, stage = folder.parents[2].name.removesuffix("-stages"), folder.parents[1].name
        raise UserError(
            f"There is no checkpoint in {folder} to take the optimizer's state from; train that stage again (--force "
            f"train/{target}/stage-{stage}), or leave slice_optimizer_state out."
        )
    return checkpoint


def say_broken(chosen: Path | None, broken: dict[Path, str]) -> list[str]:
    """Return a sentence for each broken checkpoint and where the run goes on instead."""
    instead = f"at {chosen.name}" if chosen else "at its initial weights"
    return [f"Checkpoint {path.name} is broken ({problem}); going on {instead}." for path, problem in broken.items()]


def set_aside(broken: dict[Path, str]) -> None:
    """Rename broken checkpoints so that their names are free for good ones; the latest of them is kept to look at."""
    import shutil

    for path in broken:
        place = path.with_name("broken")
        shutil.rmtree(place, ignore_errors=True)
        path.rename(place)
