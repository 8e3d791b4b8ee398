"""The checkpoints of a run: list them, and find the newest intact one. Imports no NeMo.

A run keeps two. A save is declared finished only when every rank has written its part, but a file system that fills
up, or loses data that it had acknowledged, can still leave the newest checkpoint truncated; then the run resumes from
the previous one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json, write_json
from nemo_pvs.training.job import JOB_FILE, TrainingJob

KEPT = 2
"""Number of checkpoints kept, the newest ones; while one is being written there is one more."""

SPLIT_FILE = "split.json"
"""In a checkpoint: how a model must be split to resume from it; null, or no file, if that does not matter."""

_NAME = re.compile(r"step=(\d+)-last")
_UNFINISHED = "-unfinished"  # NeMo's marker, next to a checkpoint that is being written or removed


def checkpoint_name(steps: int) -> str:
    """Return the folder name of the checkpoint after ``steps`` steps; Lightning counts steps from 0."""
    return f"step={steps - 1}-last"


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a run's checkpoint folder, newest first."""
    steps = {path: int(name[1]) for path in folder.glob("step=*") if (name := _NAME.fullmatch(path.name))}
    finished = [path for path in steps if not path.with_name(path.name + _UNFINISHED).exists()]
    return sorted(finished, key=lambda path: steps[path], reverse=True)


def damage(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be read, or None if it is intact; compares file sizes, reads no weights."""
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
    """Return the newest intact checkpoint, if any, and the newer ones that are broken, each with what is wrong."""
    broken: dict[Path, str] = {}
    for checkpoint in saved_checkpoints(folder):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, broken
        broken[checkpoint] = problem
    return None, broken


def write_split(checkpoint: Path, split: Mapping[str, Any] | None) -> None:
    """Record in a checkpoint how a model must be split (``Parallelism.split``) to resume from it; None: in any way."""
    write_json(checkpoint / SPLIT_FILE, split)


def check_split(checkpoint: Path, split: Mapping[str, Any], *, distributed_optimizer: bool) -> None:
    """Check that a run can be resumed from a checkpoint.

    Args:
        checkpoint: The checkpoint.
        split: How the run splits the model (``Parallelism.split``).
        distributed_optimizer: Whether it uses the distributed optimizer.

    Raises:
        UserError: the checkpoint was saved during a run that split the model in another way.
    """
    file = checkpoint / SPLIT_FILE
    saved = read_json(file) if file.is_file() else None
    if saved is None or (saved == split and distributed_optimizer):
        return
    words = ", ".join(f"{name} {size}" for name, size in saved.items() if size is not None)
    raise UserError(
        f"{checkpoint} was saved in the middle of a run with {words} and the distributed optimizer, and can only be "
        "resumed with the same; data_parallel may differ. A checkpoint of the last step, or after SIGTERM, can be "
        "resumed in any layout."
    )


def state_to_carry(folder: Path) -> Path:
    """Return the checkpoint from which another run takes its optimizer state, that of the last step.

    An earlier one would do for resuming, but its moments are not those of the weights that were handed over.

    Raises:
        UserError: there is no such checkpoint, or it is broken.
    """
    checkpoint, _ = newest_sound(folder)
    job = folder.parents[1] / JOB_FILE
    steps = TrainingJob.load(job).training.steps if job.is_file() else None
    if checkpoint is None or (steps is not None and checkpoint.name != checkpoint_name(steps)):
        target, number = folder.parents[2].name.removesuffix("-stages"), folder.parents[1].name
        raise UserError(
            f"There is no intact checkpoint of the last step in {folder} to take optimizer state from; train that "
            f"round again (--force train/{target}/stage-{number}), or leave slice_optimizer_state out."
        )
    return checkpoint


def say_broken(chosen: Path | None, broken: dict[Path, str]) -> list[str]:
    """Return a message for each broken checkpoint, which names the one that the run resumes from instead."""
    instead = f"resuming from {chosen.name}" if chosen else "starting again from the initial weights"
    return [f"Checkpoint {path.name} is broken ({problem}); {instead}." for path, problem in broken.items()]


def set_aside(broken: dict[Path, str]) -> None:
    """Rename broken checkpoints so that intact ones can take their names; the last is kept, in ``broken/``."""
    import shutil

    for path in broken:
        aside = path.with_name("broken")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
