"""Checksums of tensors, as recorded in manifests and hashed into fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from nemo_pvs.checkpoints.files.safetensors_file import tensor_bytes

HASH = "xxh3_128"
"""The hash of tensors in new manifests: 128 bits, as fast as memory, against damage and mix-ups but not forgery
(https://xxhash.com). SHA-256 of every tensor took longer than the rest of a conversion."""

HASHES: dict[str, Callable[[memoryview], Any]] = {
    HASH: xxhash.xxh3_128,
    "sha256": hashlib.sha256,  # of the first manifests, which do not name their hash
}


@dataclass(frozen=True)
class TensorRecord:
    """The record of one tensor under its Hugging Face name, the same in every format."""

    dtype: str
    size: tuple[int, ...]
    digest: str
    """Hash of the bytes in row-major order, by the manifest's algorithm, hexadecimal."""


def record_of(tensor: torch.Tensor, algorithm: str = HASH) -> TensorRecord:
    """Return the record of a tensor; ``algorithm`` is one of ``HASHES``."""
    digest = HASHES[algorithm](tensor_bytes(tensor)).hexdigest()
    return TensorRecord(dtype_name(tensor.dtype), tuple(tensor.shape), digest)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as spelled in config files: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")
