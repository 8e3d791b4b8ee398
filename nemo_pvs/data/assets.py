"""The files of a model that are not weights but travel with them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from nemo_pvs.data.tokenizer_config import TOKENIZER_CONFIG, for_both_versions
from nemo_pvs.system.files import write_json

_MORE_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps chat templates but the default one, each in a file of its name."""

ASSET_PATTERNS = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    f"{_MORE_TEMPLATES}/*.jinja",
    "generation_config.json",
)
# Each of these alone can make a tokenizer; the other files only add to one.
_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def asset_files(folder: Path) -> tuple[Path, ...]:
    """Return the tokenizer files, chat templates and generation config in a folder, and never weights."""
    found = {path for pattern in ASSET_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(path for path in found if not _holds_weights(path)))


def copy_asset(asset: Path, folder: Path) -> Path:
    """Copy one of ``asset_files`` to its place in another folder; return the copy.

    A tokenizer's config becomes one that both Transformers 4 and 5 load.
    """
    parent = folder / _MORE_TEMPLATES if asset.parent.name == _MORE_TEMPLATES else folder
    parent.mkdir(parents=True, exist_ok=True)
    copy = Path(shutil.copyfile(asset, parent / asset.name))
    values = for_both_versions(asset.parent) if asset.name == TOKENIZER_CONFIG else None
    if values is not None:
        write_json(copy, values)
    return copy


def _holds_weights(path: Path) -> bool:
    """Whether a file is a model after all: tokenizers saved from a GGUF model copy it as ``tokenizer.model``."""
    with open(path, "rb") as file:
        return path.suffix in _WEIGHTS or file.read(4) == b"GGUF"


def tokenizer_folder(checkpoint: Path) -> Path:
    """Return the folder with the tokenizer of a checkpoint: its own, or the one inside a NeMo context."""
    inside = checkpoint / "context" / "tokenizer"
    return inside if inside.is_dir() else checkpoint


def tokenizer_among(assets: Iterable[Path]) -> Path | None:
    """Return the folder of the tokenizer among a checkpoint's files; None if it has none."""
    return next((asset.parent for asset in assets if asset.name in _TOKENIZERS), None)
