"""What NVIDIA's driver says about the GPUs of this machine, without PyTorch and without using any of their memory."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_VERSION_FILE = Path("/proc/driver/nvidia/version")
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE: also if CUDA_VISIBLE_DEVICES hides them all
# CUdevice_attribute, of cuda.h.
_MAJOR, _MINOR, _MULTICAST = 75, 76, 132


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use."""

    name: str
    memory: int
    """Bytes."""
    capability: tuple[int, int]
    """Compute capability: (9, 0) for an H100."""
    multicast: bool
    """Whether it is connected by NVLink with multicast (NVLS), on which user buffers of Transformer Engine depend."""


class DriverError(Exception):
    """The driver is there but does not start; the message is its own name of the error."""


def driver_version() -> str | None:
    """Return the version of the kernel's NVIDIA driver; None if there is none, or not on Linux."""
    with suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)\s", _VERSION_FILE.read_text())
        return found[1] if found else "unknown"
    return None


def gpus(library: str = "libcuda.so.1") -> list[Gpu]:
    """Return the GPUs in CUDA's order; an empty list where there is no driver or ``CUDA_VISIBLE_DEVICES`` hides all.

    Args:
        library: The driver's library.

    Raises:
        DriverError: the driver does not start.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return []
    code = cuda.cuInit(0)
    if code == _NO_DEVICE:
        return []
    if code:
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(name))
        raise DriverError((name.value or b"").decode() or f"error {code}")
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return [_gpu(cuda, number) for number in range(count.value)]


def _gpu(cuda: ctypes.CDLL, number: int) -> Gpu:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), number)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int()  # stays 0 if the driver does not know the attribute
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    capability = attribute(_MAJOR), attribute(_MINOR)
    return Gpu(name.value.decode(), memory.value, capability, bool(attribute(_MULTICAST)))
