"""Whether Transformer Engine can be used here, found out by importing it rather than by looking for its folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import metadata
from typing import Any

from nemo_pvs.errors import UserError

BUILD = "pip install --no-build-isolation -c constraints-gpu.txt 'transformer-engine[pytorch]==2.9.0'"
"""The command that builds it against the PyTorch that is installed; launch/README.md says what it needs."""
REMOVE = "pip uninstall -y transformer-engine transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13"


def is_installed() -> bool:
    """Return whether there is a package ``transformer_engine``, which may still be unusable."""
    return importlib.util.find_spec("transformer_engine") is not None


def version() -> str:
    """Return the installed version; ``unknown`` if it has no metadata."""
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def import_problem() -> str | None:
    """Import Transformer Engine's PyTorch layers; return None on success, otherwise the reason in one line.

    An extension that was built for another PyTorch or CUDA exists, but fails here. Everything that it raises counts:
    missing symbols are ImportErrors, missing libraries OSErrors, and versions that do not match AssertionErrors.
    """
    if not is_installed():
        return "it is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return None


def check_import() -> None:
    """Prepare for Megatron, which takes any package ``transformer_engine`` for one that works, and else fails.

    An installed one that cannot be imported is refused where there is a GPU. Elsewhere, as on a login node without
    the driver's library, it is hidden from Megatron, as nothing there can use it.

    Raises:
        UserError: it is installed but broken, on a machine with a GPU.
    """
    if is_installed() and (problem := import_problem()):
        import torch

        if not torch.cuda.is_available():
            sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # importing it raises ImportError
            return
        raise UserError(
            f"Transformer Engine {version()} is installed but cannot be imported ({problem}), so Megatron cannot "
            f"either; build it for this PyTorch ({BUILD}), or remove it ({REMOVE})."
        )


def without_fp8() -> AbstractContextManager[Any]:
    """Return a context in which layers compute in the type of their weights, also inside one where they use FP8."""
    engine = sys.modules.get("transformer_engine.pytorch")
    return engine.fp8_autocast(enabled=False) if engine else nullcontext()
