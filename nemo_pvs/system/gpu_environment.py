"""The environment variables of every process that uses GPUs, however it is started."""

from __future__ import annotations

import os
from collections.abc import Mapping

GPU_ENVIRONMENT: Mapping[str, str] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # launch order of kernels, which overlapped communication needs
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",  # frees buffers as soon as NCCL has read them
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # less fragmentation
}
"""Commands and ranks of ours set these themselves; launch profiles pass them to processes that NeMo-Run starts."""


def set_gpu_environment() -> None:
    """Set the variables that the user has not set; call this before PyTorch is imported, which reads some of them."""
    for name, value in GPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
