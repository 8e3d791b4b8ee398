"""Our conversion of a model of 1.1B parameters compared with NeMo's own importer on the CPU: seconds and memory.

    python -m tests.benchmarks.nemo_importer [--shape tiny] [--folder DIR]

Imports of libraries are shown apart. NeMo's importer needs a CUDA device and Transformer Engine;
``tests.nemo_connectors`` lets it run without. Ours verifies what it wrote, NeMo's does not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def with_nemo(source: Path, target: Path) -> float:
    """Convert with NeMo's importer; return the seconds that the imports took."""
    begun = time.perf_counter()
    import torch
    from nemo.collections.llm.gpt.model import llama  # noqa: F401

    import nemo_pvs.megatron.pretrain  # noqa: F401
    from tests.nemo_connectors import import_with_nemo

    torch.set_num_threads(1)
    imported = time.perf_counter() - begun
    import_with_nemo(source, target)
    return imported


def with_ours(source: Path, target: Path) -> float:
    """Convert with ``pvs convert``, verification included; return the seconds that the imports took."""
    begun = time.perf_counter()
    import torch

    from nemo_pvs.checkpoints.convert import convert

    torch.set_num_threads(1)
    imported = time.perf_counter() - begun
    convert(source, target, to="nemo")
    return imported


CONTENDERS = {"nemo": with_nemo, "ours": with_ours}


def run(name: str, source: Path, target: Path) -> dict[str, float]:
    """Run a contender in a new process; return its seconds, and the most memory of it and its children together."""
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--contender", name]
    child = subprocess.Popen([*command, source, target], stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while child.poll() is None:
            peak = max(peak, sum(map(_proportional_bytes, _family(child.pid))))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = child.communicate()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{name} failed")
    return {**json.loads(output.splitlines()[-1]), "peak": peak}


def _family(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has just ended
        return []
    return [process, *(one for child in children for one in _family(int(child)))]


def _proportional_bytes(process: int) -> int:
    """Return the resident bytes of a process; pages that it shares with others count in part."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_importer"))
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, source, target = options.contender
        begun = time.perf_counter()
        imported = CONTENDERS[name](Path(source), Path(target))
        print(json.dumps({"imports": imported, "seconds": time.perf_counter() - begun - imported}))
        return
    compare(options.shape, options.folder)


def compare(shape: str, folder: Path) -> None:
    """Make the input, run both on it, check that they agree in every weight, and show the table."""
    import torch

    from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.model.layout import Layout
    from tests.benchmarks.conversion import SHAPES, make_input
    from tests.benchmarks.measure import forget_cached, measure
    from tests.conftest import save_tiny_tokenizer

    source = folder / "hf"
    if not source.exists():
        measure(make_input, SHAPES[shape], source)
        save_tiny_tokenizer(source)  # NeMo's importer wants one
    results = {}
    for name in CONTENDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
        forget_cached(source)
        results[name] = run(name, source, folder / name)
    theirs, ours = (NemoSource(folder / name) for name in CONTENDERS)
    for name in Layout.for_config(ours.config).parts(shape_of(ours)):
        if not torch.equal(theirs.read(name), ours.read(name)):
            raise SystemExit(f"{name} differs")
    table = Table("", "NeMo", "ours", "NeMo / ours", title=f"{SHAPES[shape]}")
    for label, key, scale in (("seconds", "seconds", 1), ("imports, seconds", "imports", 1), ("peak MB", "peak", 1e6)):
        a, b = (results[name][key] / scale for name in CONTENDERS)
        table.add_row(label, f"{a:,.1f}", f"{b:,.1f}", f"{a / b:.1f}")
    Console().print(table)
    for name in CONTENDERS:
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    main()
