"""Recognises what users often give instead of a model, and says what to give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_POINTER_BYTES = 1024
"""Upper limit for the size of a pointer, by the specification."""

ADAPTER_CONFIG = "adapter_config.json"

# Suffixes of tensors that accompany or replace quantised weights.
_QUANTISED = {
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8",
    ".weight_scale_inv": "FP8",
}
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8"}


def refuse_other_folders(folder: Path) -> None:
    """Refuse folders that look like a model but are not.

    Raises:
        UserError: the folder is a repository of the Hugging Face cache, or contains a LoRA adapter, GGUF files, or Git
            LFS pointers instead of files.
    """
    if (folder / "snapshots").is_dir() and folder.name.startswith("models--"):
        _refuse_cache(folder)
    if (folder / ADAPTER_CONFIG).is_file() and not _has_weights(folder):
        base = read_json(folder / ADAPTER_CONFIG)
        base = base.get("base_model_name_or_path") if isinstance(base, dict) else None
        raise UserError(adapter_sentence(str(folder), base))
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs and not (folder / "config.json").is_file():
        raise UserError(f"{folder} contains GGUF files; give one of them, for example {folder / ggufs[0]}.")
    for part in (folder, folder / "weights", folder / "context" / "tokenizer"):
        for path in sorted(part.glob("*")):
            refuse_lfs_pointer(path)


def adapter_sentence(adapter: str, base: object = None) -> str:
    """Return the message for a LoRA adapter; ``base`` is the name of its base model, if known."""
    return (
        f"{adapter} is a LoRA adapter, not a model; merge it into its base model{f' {base}' if base else ''} with "
        "PEFT (merge_and_unload), save the result, and give that."
    )


def refuse_lfs_pointer(path: Path) -> None:
    """Raise UserError if a file is a Git LFS pointer instead of the real file."""
    if not path.is_file() or path.stat().st_size >= _LFS_POINTER_BYTES:
        return
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in the clone, or download the "
                "model with hf download."
            )


def refuse_quantised(folder: Path, stated: str | None, tensors: Iterable[str], odd: Sequence[str]) -> None:
    """Raise UserError if the tensors of a folder are quantised weights.

    Args:
        folder: The model.
        stated: The quantisation method that its config names, if any.
        tensors: The names of all its tensors, whose suffixes reveal some methods.
        odd: Names of tensors that a plain model does not have, if the config names a method.
    """
    quantised = [(name, method) for name in tensors for end, method in _QUANTISED.items() if name.endswith(end)]
    quantised += [(name, str(stated)) for name in odd]
    if not quantised:
        return
    name, method = quantised[0]
    method = _METHODS.get(str(stated), stated or method)
    advice = "give the original, unquantised model"
    if method == "bitsandbytes":
        advice += ", or load these weights with transformers, call dequantize() and save the result"
    raise UserError(
        f"{folder} has weights quantised by {method} (such as {name}), which cannot be pruned or trained; {advice}."
    )


def _refuse_cache(folder: Path) -> None:
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    if not snapshots:
        raise UserError(f"{folder} is a folder of the Hugging Face cache without a snapshot; download the model.")
    which = str(snapshots[0]) if len(snapshots) == 1 else f"one of {', '.join(map(str, snapshots))}"
    raise UserError(f"{folder} is a folder of the Hugging Face cache; give the snapshot in it: {which}.")


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("model*.safetensors", "pytorch_model*.bin"))
