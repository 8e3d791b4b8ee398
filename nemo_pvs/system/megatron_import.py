"""Imports Megatron-Core without the CUDA compilation that it starts on import."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nemo_pvs.system.transformer_engine import check_import

_COMPILES = "megatron.core.inference.unified_memory"
"""Compiles a CUDA memory allocator for inference when it is imported; other modules of Megatron import it."""


def import_megatron() -> None:
    """Import ``megatron.core``; call this before any other import from Megatron or NeMo.

    Megatron 0.15 compiles a CUDA memory allocator on import: on every rank, for a minute, with a lock file in the
    home folder. A rank that is killed meanwhile leaves the lock there, and every later import waits for it forever.
    Where there is a CUDA toolkit but no device, as on a login node, the compilation fails with an IndexError. Only
    inference in unified memory needs the allocator, so nothing is compiled here, and Megatron takes its path for
    machines without a compiler. Warnings about optional kernels, and about a toolkit without a device, are silenced.

    Raises:
        UserError: Transformer Engine is installed, but broken.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    for name in ("megatron.core.utils", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    check_import()
    with _nothing_compiled():
        importlib.import_module("megatron.core")
        with suppress(ModuleNotFoundError):  # versions before 0.15 have none
            importlib.import_module(_COMPILES)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Make PyTorch's compilation of extensions fail within the block, before it touches its lock file."""
    from torch.utils import cpp_extension

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("nemo_pvs imports Megatron without compiling extensions.")

    compile_inline = cpp_extension.load_inline
    cpp_extension.load_inline = refuse
    try:
        yield
    finally:
        cpp_extension.load_inline = compile_inline
