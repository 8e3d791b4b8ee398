"""A rank that sums a tensor with all others, under torchrun: ``python -m nemo_pvs.doctor.all_reduce ANSWER``."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from nemo_pvs.system.gpu_environment import set_gpu_environment
from nemo_pvs.system.rendezvous import local_rank

_BYTES = {True: 2**28, False: 2**20}
"""Size of the tensor, on GPUs and on a CPU."""
_TIMES = 5


def main(answer: Path) -> None:
    """Sum twice, first to connect and then to measure, and let the first rank write a sentence into ``answer``."""
    set_gpu_environment()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=120))
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    sums = []
    for _ in range(_TIMES):
        tensor = torch.full((_BYTES[gpu] // 4,), rank + 1.0, device=device)
        distributed.all_reduce(tensor)
        sums.append(float(tensor[-1]))
    begin = time.monotonic()
    for _ in range(_TIMES):
        distributed.all_reduce(tensor)
    if gpu:
        torch.cuda.synchronize()
    seconds = (time.monotonic() - begin) / _TIMES
    expected = ranks * (ranks + 1) / 2
    if set(sums) != {expected}:
        raise RuntimeError(f"The sum over {ranks} ranks is {sums}, not {expected}.")
    distributed.destroy_process_group()
    if rank == 0:
        moved = 2 * (ranks - 1) / ranks * _BYTES[gpu] / seconds / 1e9
        how = "NCCL" if gpu else "gloo"
        answer.write_text(
            f"{ranks} ranks by {how}, {_BYTES[gpu] // 2**20} MiB in {seconds * 1e3:.1f} ms ({moved:.1f} GB/s)"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
