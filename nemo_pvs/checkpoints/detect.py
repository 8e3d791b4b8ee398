"""Open a checkpoint of whatever format."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.checkpoints.huggingface import HuggingFaceSource
from nemo_pvs.checkpoints.megatron import NemoSource
from nemo_pvs.errors import UserError


def open_source(path: str | Path) -> HuggingFaceSource | NemoSource:
    """Open a checkpoint, whatever its format.

    Raises:
        UserError: there is nothing at ``path``, or it is not a checkpoint that we read.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give the folder of a Hugging Face model or a NeMo checkpoint.")
    if (folder / "config.json").is_file():
        return HuggingFaceSource(folder)
    if (folder / "weights").is_dir():
        return NemoSource(folder)
    raise UserError(
        f"{folder} is neither a Hugging Face model (no config.json) nor a NeMo checkpoint (no weights/ folder)."
    )
