"""Opens a checkpoint of any supported format."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from nemo_pvs.checkpoints.fetch import SMOLLM2, is_gguf
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.megatron.source import MegatronSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.errors import UserError
from nemo_pvs.model.megatron_run import TRACKER, latest_checkpoint
from nemo_pvs.model.not_a_model import refuse_other_folders
from nemo_pvs.system.files import read_json


def open_source(path: str | Path, config: str | Path | None = None) -> HuggingFaceSource | NemoSource:
    """Open a checkpoint of any supported format.

    Args:
        path: A Hugging Face folder, a NeMo checkpoint, or a torch_dist folder of Megatron-LM or Megatron-Bridge
            (``iter_<n>``, or the run's folder for its latest checkpoint).
        config: For a torch_dist folder without a usable config: ``config.json`` or the folder that contains it.

    Raises:
        UserError: ``path`` does not exist, or is not a checkpoint that we read.
    """
    folder = Path(path)
    name = re.sub("^hf:/+", "hf://", str(path))  # a Path has lost a slash
    if not folder.is_dir() and (name == SMOLLM2 or name.startswith("hf://") or is_gguf(name)):
        raise UserError(
            f"{name} is not a folder, which is needed here; write one with pvs convert {shlex.quote(name)} DST --to "
            "hf, and give that."
        )
    if not folder.exists():
        raise UserError(
            f"{folder} does not exist; give the folder of a checkpoint, or hf://owner/name to download one."
        )
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder of a checkpoint.")
    refuse_other_folders(folder)
    folder = latest_checkpoint(folder)
    _refuse_other_formats(folder)
    if (folder / ".metadata").is_file():
        of_nemo = folder.name == "weights" and (folder.parent / "context").is_dir() and config is None
        return NemoSource(folder.parent) if of_nemo else MegatronSource(folder, config)
    if (folder / "weights").is_dir() and not (folder / "config.json").is_file():
        return NemoSource(folder) if config is None else MegatronSource(folder / "weights", config)
    if config is not None:
        raise UserError(f"{folder} is not a torch_dist checkpoint, so it needs no config; leave {config} out.")
    if (folder / "config.json").is_file():
        return HuggingFaceSource(folder)
    if any(path.is_dir() for path in folder.glob("iter_*")):
        raise UserError(
            f"{folder} has no {TRACKER}, so none of its iterations is known to be finished; give the folder of one "
            "that is (iter_...)."
        )
    raise UserError(
        f"{folder} is not a Hugging Face model (no config.json), a NeMo checkpoint (no weights/ folder) or a "
        "Megatron-LM or Megatron-Bridge checkpoint (no .metadata); give the folder of a checkpoint."
    )


def _refuse_other_formats(folder: Path) -> None:
    """Refuse the formats that NeMo and Megatron-LM wrote before torch_dist."""
    again = (
        "load it with the version that wrote it and save it as torch_dist (NeMo: "
        "MegatronStrategy(save_ckpt_format='torch_dist'), Megatron-LM: --ckpt-convert-format torch_dist)"
    )
    for weights in (folder, folder / "weights"):
        path = weights / "metadata.json"
        metadata = read_json(path) if path.is_file() else None
        zarr = isinstance(metadata, dict) and metadata.get("sharded_backend") == "zarr"
        if zarr or next(weights.glob("*/.zarray"), None):
            raise UserError(f"{folder} is a zarr checkpoint, which is not supported; {again}.")
    if next(folder.glob("mp_rank_*"), None):
        raise UserError(f"{folder} is a checkpoint in Megatron-LM's old format, one file per rank; {again}.")
