"""The environment variables of every process that uses GPUs, however it is started."""

from __future__ import annotations

import os
from collections.abc import Mapping

GPU_ENVIRONMENT: Mapping[str, str] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # launch order of kernels, which overlapped communication needs
    # Less fragmentation. PyTorch 2.9 calls this name deprecated, but ignores the option under the new one,
    # PYTORCH_ALLOC_CONF (pytorch/pytorch#183387). Every version up to 2.13 reads this one.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # Products of fp32 matrices in fp32, as on a CPU: NVIDIA's containers set 1, for TF32 with its 10 bits of mantissa.
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
}
"""Commands and ranks of ours set these themselves; launch profiles pass them to processes that NeMo-Run starts."""

_SET_BY_CONTAINERS = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


def set_gpu_environment() -> None:
    """Set the variables that the user has not set; call this before PyTorch is imported, which reads some of them.

    What a container sets for everybody is replaced.
    """
    for name, value in GPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[_SET_BY_CONTAINERS] = GPU_ENVIRONMENT[_SET_BY_CONTAINERS]
