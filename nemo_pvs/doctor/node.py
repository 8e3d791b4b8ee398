"""What the doctor finds out about a machine, and what it says about it."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nemo_pvs.doctor.finding import Finding
from nemo_pvs.system.cuda_driver import DriverError, Gpu, driver_version, gpus
from nemo_pvs.system.files import user_cache

_GIB = 2**30
_SHARED_MEMORY = 1 * _GIB
"""Less than this in /dev/shm is a container's default of 64 MB."""
_DISK = {True: 50 * _GIB, False: 5 * _GIB}
"""Less free space than this is too little for checkpoints, with and without GPUs."""
_BUSY = 1 * _GIB
"""More GPU memory in use than this belongs to another process, not to the driver."""
_DRIVER_FIXES = {
    "CUDA_ERROR_SYSTEM_NOT_READY": "sudo systemctl start nvidia-fabricmanager",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot the node, whose driver was replaced while it was loaded",
}


@dataclass(frozen=True)
class Node:
    """Facts about this machine; sizes in bytes."""

    host: str
    driver: str | None = None
    """Version of NVIDIA's driver; None if there is no driver."""
    driver_problem: str | None = None
    gpus: tuple[Gpu, ...] = ()
    """GPUs that this process may use, according to the driver."""
    busy: tuple[tuple[int, int], ...] = ()
    """Index of each GPU that other processes use, and the memory that they use."""
    torch_gpus: int = 0
    """GPUs that PyTorch can use."""
    torch_cuda: str | None = None
    """CUDA version that PyTorch is built for, None if it is built for CPUs."""
    torch_problem: str = ""
    """What PyTorch says if it cannot use the driver's GPUs."""
    nccl: str | None = None
    apex: bool = False
    visible: str | None = None
    """``CUDA_VISIBLE_DEVICES``."""
    cpus: int = 1
    shared_memory: int | None = None
    """Size of /dev/shm."""
    disk: int = 0
    """Free space in ``folder``."""
    folder: Path = Path()
    locked_memory: int | None = None
    """Limit of ``ulimit -l``, None if there is none."""
    infiniband: bool = False
    locks: tuple[Path, ...] = ()
    """Lock files of compilations that are not running any more."""

    @classmethod
    def here(cls) -> Node:
        """Find out about this machine, without using memory of its GPUs."""
        import torch
        from torch.distributed import is_nccl_available

        found: tuple[Gpu, ...] = ()
        driver, problem = driver_version(), None
        try:
            found = tuple(gpus())
        except DriverError as error:
            problem = str(error)
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        shared = Path("/dev/shm")
        return cls(
            host=socket.gethostname(),
            driver=driver,
            driver_problem=problem,
            gpus=found,
            busy=_busy() if found else (),
            torch_gpus=usable,
            torch_cuda=torch.version.cuda,
            torch_problem=_torch_problem() if found and not usable else "",
            nccl=".".join(map(str, torch.cuda.nccl.version())) if usable and is_nccl_available() else None,
            apex=find_spec("apex") is not None,
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            shared_memory=shutil.disk_usage(shared).total if shared.is_dir() else None,
            disk=shutil.disk_usage(Path.cwd()).free,
            folder=Path.cwd(),
            locked_memory=None if limit == resource.RLIM_INFINITY else limit,
            infiniband=any(Path("/sys/class/infiniband").glob("*")),
            locks=tuple(_left_locks()),
        )


def check_node(node: Node, *, build: bool = False) -> list[Finding]:
    """Return the findings about a machine.

    Args:
        node: The machine.
        build: Whether an image is being built, where no GPU is visible and only packages matter.
    """
    if build:
        return [Finding("note", "GPUs", "none are visible while an image is built, so they are not checked")]
    return [*_check_gpus(node), *_check_limits(node), *_check_files(node)]


def _check_gpus(node: Node) -> list[Finding]:
    if node.driver_problem:
        fix = _DRIVER_FIXES.get(node.driver_problem, "nvidia-smi, which says more")
        return [Finding("FAIL", "driver", f"{node.driver} does not start: {node.driver_problem}", fix)]
    if node.driver is None and not node.gpus:
        return [Finding("ok", "GPUs", f"none; {node.cpus} CPU cores")]
    driver = Finding("ok", "driver", f"{node.driver or 'of unknown version'}")
    if not node.gpus and node.visible is not None:
        hidden = f"hidden by CUDA_VISIBLE_DEVICES={node.visible!r}"
        return [driver, Finding("note", "GPUs", hidden, "unset CUDA_VISIBLE_DEVICES")]
    if not node.gpus:
        fix = "srun --gpus-per-node 8, or docker run --gpus all"
        return [driver, Finding("FAIL", "GPUs", "the node has a driver, but this process sees no GPU", fix)]
    findings = [driver, _describe(node)]
    if node.torch_cuda is None:
        fix = "pip install -c constraints-gpu.txt torch"
        findings.append(Finding("FAIL", "PyTorch", "it is built for CPUs and cannot use these GPUs", fix))
    elif not node.torch_gpus:
        text = f"it is built for CUDA {node.torch_cuda} and cannot use these GPUs: {node.torch_problem}"
        fix = f"install a PyTorch for a CUDA that driver {node.driver} supports (nvidia-smi shows it)"
        findings.append(Finding("FAIL", "PyTorch", text, fix))
    if min(gpu.capability for gpu in node.gpus) < (8, 0):
        findings.append(Finding("warn", "GPUs", "they have no bf16 arithmetic", "set precision: fp32 in the recipe"))
    for number, used in node.busy:
        text = f"other processes use {used / _GIB:.1f} GiB of GPU {number}"
        findings.append(Finding("warn", "GPUs", text, "nvidia-smi, which names them"))
    return findings


def _describe(node: Node) -> Finding:
    kinds = Counter((gpu.name, gpu.memory) for gpu in node.gpus)
    words = [f"{count} x {name}, {memory / _GIB:.0f} GiB" for (name, memory), count in kinds.items()]
    words.append("multicast" if all(gpu.multicast for gpu in node.gpus) else "no multicast")
    words += [f"CUDA {node.torch_cuda}"] * (node.torch_cuda is not None) + [f"NCCL {node.nccl}"] * (
        node.nccl is not None
    )
    words.append("Apex" if node.apex else "no Apex")
    return Finding("ok", "GPUs", ", ".join(words))


def _check_limits(node: Node) -> list[Finding]:
    findings = []
    if node.gpus and node.shared_memory is not None and node.shared_memory < _SHARED_MEMORY:
        text = f"/dev/shm has {node.shared_memory / 2**20:.0f} MiB, too little for NCCL and data loaders"
        findings.append(Finding("FAIL", "shared memory", text, "docker run --ipc=host"))
    if node.infiniband and node.gpus and node.locked_memory is not None:
        text = f"ulimit -l is {node.locked_memory // 1024:,} kB, but NCCL over InfiniBand needs it unlimited"
        fix = "docker run --ulimit memlock=-1, or LimitMEMLOCK=infinity for slurmd"
        findings.append(Finding("warn", "locked memory", text, fix))
    return findings


def _check_files(node: Node) -> list[Finding]:
    findings = []
    text = f"{node.disk / _GIB:,.0f} GiB free in {node.folder}"
    if node.disk < _DISK[bool(node.gpus)]:
        findings.append(Finding("warn", "disk", text, "run in a folder on a larger file system, or give --out"))
    else:
        findings.append(Finding("ok", "disk", text))
    for lock in node.locks:
        text = f"{lock} was left by a compilation that was killed; nemo waits for it forever (pvs does not)"
        findings.append(Finding("warn", "lock", text, f"rm {lock}"))
    return findings


def _busy() -> tuple[tuple[int, int], ...]:
    """Return the GPUs of which more memory is in use than the driver needs, as ``nvidia-smi`` counts them."""
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        used = [(int(number), int(mib) * 2**20) for number, mib in (line.split(",") for line in said.splitlines())]
        return tuple((number, size) for number, size in used if size > _BUSY)
    return ()


def _torch_problem() -> str:
    """Return the error that PyTorch raises when it uses a GPU."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError or AssertionError, by version
        return str(error).strip().splitlines()[0]
    return "it does not say why"


def _left_locks() -> list[Path]:
    """Return lock files of PyTorch's compilations whose folder has not been written to for ten minutes."""
    chosen, cache = os.environ.get("TORCH_EXTENSIONS_DIR"), user_cache()
    root = Path(chosen) if chosen else cache and cache / "torch_extensions"
    if root is None:
        return []
    old, left = time.time() - 600, []
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        with suppress(FileNotFoundError):  # the compilation has just ended
            if lock.stat().st_mtime < old:
                left.append(lock)
    return left
