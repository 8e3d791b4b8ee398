"""What it costs to know which model this is, and to compare every tensor with the manifest: seconds compared with dd.

    python -m tests.benchmarks.checksums --shape 1b --folder DIR

needs free disk of 2 times the model, and makes the model, of random numbers, itself. Each row reads a model that was
dropped from the page cache, in a process of its own; rows take turns, and the table has the median of each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nemo_pvs.checkpoints.convert import convert, read_through
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.manifest import MANIFEST
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
from tests.benchmarks.conversion import SHAPES, make_input
from tests.benchmarks.measure import forget_cached, measure


def read_with_dd(folder: Path) -> None:
    """Read every file past the page cache, as fast as the disk goes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size > 1 << 20:
            command = ["dd", f"if={path}", "of=/dev/null", "bs=16M", "iflag=direct", "status=none"]
            subprocess.run(command, check=True)


def read(folder: Path) -> None:
    torch.set_num_threads(1)
    read_through(open_source(folder))


def read_without_comparing(folder: Path) -> None:
    with ignoring_manifests():
        read(folder)


def name_from_manifest(folder: Path) -> None:
    assert (folder / MANIFEST).exists()
    fingerprint(open_source(folder))


def name_by_reading(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # empty
    with ignoring_manifests():
        fingerprint(open_source(folder))


def name_from_cache(folder: Path) -> None:
    with ignoring_manifests():
        fingerprint(open_source(folder))


def benchmark(shape_name: str, folder: Path, console: Console, rounds: int) -> dict[str, float]:
    """Measure and show everything; returns seconds by row."""
    source = folder / "hf"
    if not source.exists():
        with console.status("make the input"):
            measure(make_input, SHAPES[shape_name], source)
    nemo = folder / "nemo"
    if not nemo.exists():
        convert(source, nemo, to="nemo")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    name_from_cache(source)
    rows: dict[str, tuple[Callable[[Path], None], Path]] = {
        "dd of the Hugging Face folder": (read_with_dd, source),
        "read the Hugging Face folder, compare nothing": (read_without_comparing, source),
        "read it, compare each tensor with the manifest": (read, source),
        "fingerprint, manifest there": (name_from_manifest, source),
        "fingerprint, no manifest, first time": (name_by_reading, source),
        "fingerprint, no manifest, again": (name_from_cache, source),
        "read the NeMo folder, compare PyTorch's CRC-32": (read_without_comparing, nemo),
        "read it, compare each tensor with the manifest ": (read, nemo),
    }
    seconds: dict[str, list[float]] = {label: [] for label in rows}
    for _ in range(rounds):
        for label, (work, place) in rows.items():
            forget_cached(place)
            seconds[label].append(measure(work, place).seconds)
    medians = {label: statistics.median(measured) for label, measured in seconds.items()}
    table = Table("", "s", "x dd", title=f"{SHAPES[shape_name]}, median of {rounds}")
    for label, median in medians.items():
        table.add_row(label.strip(), f"{median:.2f}", f"{median / medians['dd of the Hugging Face folder']:.2f}")
    console.print(table)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_checksums"))
    options = parser.parse_args()
    benchmark(options.shape, options.folder, Console(), options.rounds)


if __name__ == "__main__":
    main()
