"""Imports Megatron-Core on machines that have the CUDA toolkit but no device, such as a cluster's login node."""

from __future__ import annotations

import importlib
import logging
import warnings


def import_megatron() -> None:
    """Import ``megatron.core``; call this before any other import from Megatron or NeMo.

    On import, Megatron 0.15 compiles a CUDA memory allocator if PyTorch finds a toolkit, and PyTorch then fails with
    an IndexError when it queries the absent devices for their architecture. Hiding the toolkit during the import makes
    Megatron take its path for machines without one. If there is a device, nothing is hidden. Warnings about
    optional kernels are silenced.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    logging.getLogger("megatron.core.utils").setLevel(logging.ERROR)
    import torch
    from torch.utils import cpp_extension

    toolkit = cpp_extension.CUDA_HOME
    if not torch.cuda.is_available():
        cpp_extension.CUDA_HOME = None
    try:
        importlib.import_module("megatron.core")
    finally:
        cpp_extension.CUDA_HOME = toolkit
