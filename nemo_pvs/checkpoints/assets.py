"""The files of a model that are not weights but travel with them."""

from __future__ import annotations

from pathlib import Path

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def asset_files(folder: Path) -> tuple[Path, ...]:
    """Return the tokenizer files, chat templates and generation config in a folder, and never weights."""
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(path for path in found if not _holds_weights(path)))


def _holds_weights(path: Path) -> bool:
    """Whether a file is a model after all: tokenizers saved from a GGUF model copy it as ``tokenizer.model``."""
    with open(path, "rb") as file:
        return path.suffix in _WEIGHTS or file.read(4) == b"GGUF"


def tokenizer_folder(checkpoint: Path) -> Path:
    """Return the folder with the tokenizer of a checkpoint: its own, or the one inside a NeMo context."""
    inside = checkpoint / "context" / "tokenizer"
    return inside if inside.is_dir() else checkpoint
