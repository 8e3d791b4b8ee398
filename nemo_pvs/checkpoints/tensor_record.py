"""Checksums of tensors: what a manifest notes of each, and what a model's fingerprint is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from nemo_pvs.checkpoints.files.safetensors_file import tensor_bytes

HASH = "xxh3_128"
"""What new manifests name tensors by: 128 bits, as fast as memory, against damage and mix-ups but not against forgers
(https://xxhash.com). SHA-256 of every tensor took longer than all the rest of a conversion."""

HASHES: dict[str, Callable[[memoryview], Any]] = {
    HASH: xxhash.xxh3_128,
    "sha256": hashlib.sha256,  # the first manifests, which do not say so
}


@dataclass(frozen=True)
class TensorRecord:
    """One tensor under its Hugging Face name, the same in every format."""

    dtype: str
    size: tuple[int, ...]
    digest: str
    """Hash, by the manifest's algorithm, of the bytes in row-major order; hexadecimal."""


def record_of(tensor: torch.Tensor, algorithm: str = HASH) -> TensorRecord:
    """Return the record of a tensor; ``algorithm`` is one of ``HASHES``."""
    digest = HASHES[algorithm](tensor_bytes(tensor)).hexdigest()
    return TensorRecord(dtype_name(tensor.dtype), tuple(tensor.shape), digest)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as config files spell it: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")
