"""Open a checkpoint of whatever format."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.nemo.megatron_lm import MegatronSource
from nemo_pvs.errors import UserError
from nemo_pvs.model.not_a_model import refuse_other_folders
from nemo_pvs.system.files import read_json

_TRACKER = "latest_checkpointed_iteration.txt"  # of a Megatron-LM run: a number, or "release"


def open_source(path: str | Path, config: str | Path | None = None) -> HuggingFaceSource | NemoSource:
    """Open a checkpoint, whatever its format.

    Args:
        path: A Hugging Face folder, a NeMo checkpoint, or a torch_dist folder of Megatron-LM (``iter_<n>``, or the
            folder of the run for its latest).
        config: For a torch_dist folder without a usable config: ``config.json`` or the folder that holds it.

    Raises:
        UserError: there is nothing at ``path``, or it is not a checkpoint that we read.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give the folder of a Hugging Face model or a NeMo checkpoint.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder of a checkpoint.")
    refuse_other_folders(folder)
    if (folder / _TRACKER).is_file():
        folder = _latest(folder)
    _refuse_other_formats(folder)
    if (folder / ".metadata").is_file():
        of_nemo = folder.name == "weights" and (folder.parent / "context").is_dir() and config is None
        return NemoSource(folder.parent) if of_nemo else MegatronSource(folder, config)
    if (folder / "weights").is_dir() and not (folder / "config.json").is_file():
        return NemoSource(folder) if config is None else MegatronSource(folder / "weights", config)
    if config is not None:
        raise UserError(f"{folder} is no torch_dist checkpoint, so it needs no config; leave {config} out.")
    if (folder / "config.json").is_file():
        return HuggingFaceSource(folder)
    raise UserError(
        f"{folder} is neither a Hugging Face model (no config.json) nor a NeMo checkpoint (no weights/ folder) nor "
        "one of Megatron-LM (no .metadata)."
    )


def _latest(run: Path) -> Path:
    """Return the folder of the last checkpoint of a Megatron-LM run."""
    last = (run / _TRACKER).read_text().strip()
    folder = run / (f"iter_{int(last):07d}" if last.isdecimal() else last)
    if not folder.is_dir():
        raise UserError(f"{run / _TRACKER} names {folder.name}, which is not there; give the checkpoint's folder.")
    return folder


def _refuse_other_formats(folder: Path) -> None:
    """Refuse what NeMo and Megatron-LM wrote before torch_dist."""
    again = (
        "load it with the version that wrote it and save it as torch_dist (NeMo: "
        "MegatronStrategy(save_ckpt_format='torch_dist'), Megatron-LM: --ckpt-convert-format torch_dist)"
    )
    for weights in (folder, folder / "weights"):
        about = weights / "metadata.json"
        stated = read_json(about) if about.is_file() else None
        zarr = isinstance(stated, dict) and stated.get("sharded_backend") == "zarr"
        if zarr or next(weights.glob("*/.zarray"), None):
            raise UserError(f"{folder} is a zarr checkpoint, which is not read; {again}.")
    if next(folder.glob("mp_rank_*"), None):
        raise UserError(f"{folder} is a checkpoint in Megatron-LM's old format, a file a rank; {again}.")
