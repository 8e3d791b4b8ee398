"""The files of a model that are copied along with its weights: tokenizer, chat templates, generation config."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from nemo_pvs.data.tokenizer_config import TOKENIZER_CONFIG, for_both_versions
from nemo_pvs.model.megatron_run import latest_checkpoint
from nemo_pvs.system.files import write_json

MORE_TEMPLATES = "additional_chat_templates"
"""The folder in which transformers stores additional chat templates, one file each, under their names."""

ASSET_PATTERNS = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    f"{MORE_TEMPLATES}/*.jinja",
    "generation_config.json",
)
# Each of these is enough for a tokenizer; the other files only add to it.
_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def asset_files(folder: Path) -> tuple[Path, ...]:
    """Return the tokenizer files, chat templates and generation config in a folder, but never weights."""
    paths = {path for pattern in ASSET_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(path for path in paths if not _holds_weights(path)))


def copy_asset(asset: Path, folder: Path) -> Path:
    """Copy one of ``asset_files`` to another folder and return the copy.

    The tokenizer's config is converted to one that both Transformers 4 and 5 load.
    """
    parent = folder / MORE_TEMPLATES if asset.parent.name == MORE_TEMPLATES else folder
    parent.mkdir(parents=True, exist_ok=True)
    copy = Path(shutil.copyfile(asset, parent / asset.name))
    values = for_both_versions(asset.parent) if asset.name == TOKENIZER_CONFIG else None
    if values is not None:
        write_json(copy, values)
    return copy


def _holds_weights(path: Path) -> bool:
    """Return whether a file has weights: transformers saves a GGUF model's file as ``tokenizer.model``."""
    with open(path, "rb") as file:
        return path.suffix in _WEIGHTS or file.read(4) == b"GGUF"


def tokenizer_folder(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's tokenizer: the checkpoint itself, or the folder that its format has for it.

    Raises:
        UserError: the checkpoint is the folder of a Megatron run that has none (``latest_checkpoint``).
    """
    checkpoint = latest_checkpoint(checkpoint)
    of_nemo, of_megatron = checkpoint / "context" / "tokenizer", checkpoint / "tokenizer"
    if of_nemo.is_dir():
        return of_nemo
    return of_megatron if of_megatron.is_dir() and (checkpoint / ".metadata").is_file() else checkpoint


def tokenizer_among(assets: Iterable[Path]) -> Path | None:
    """Return the folder of the tokenizer among a checkpoint's assets; None if it has none."""
    return next((asset.parent for asset in assets if asset.name in _TOKENIZERS), None)
