"""Our conversion of a model of 1.1B parameters beside NeMo's own importer on the CPU: seconds and memory.

    python -m tests.benchmarks.nemo_importer [--shape tiny] [--folder DIR]

Imports of libraries are not counted, but shown. NeMo's importer needs a CUDA device, Transformer Engine and its
kernels; where they are not, ``megatron_on_cpu`` and the class below let it run, in no other way slower or larger.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def with_nemo(source: Path, target: Path) -> float:
    """Convert with NeMo's importer; return the seconds that the imports took."""
    begun = time.perf_counter()
    import torch
    from megatron.core.models.common.embeddings import rope_utils
    from nemo.collections.llm.gpt.model import llama

    from nemo_pvs.training.attention import sdpa_layer_spec
    from nemo_pvs.training.cpu import megatron_on_cpu
    from nemo_pvs.training.recipe import _FUSED_KERNELS

    torch.set_num_threads(1)
    # NeMo's config refuses to be built without the fused kernel, which is not called here.
    rope_utils.fused_apply_rotary_pos_emb = rope_utils.apply_rotary_pos_emb

    class OnCpu(llama.HFLlamaImporter):
        @property
        def config(self) -> Any:
            config = super().config
            for kernel in _FUSED_KERNELS:
                setattr(config, kernel, False)
            config.transformer_layer_spec = sdpa_layer_spec
            config.use_cpu_initialization = True
            config.perform_initialization = False
            return config

        def convert_state(self, source: Any, target: Any) -> Any:
            """Name the norms as Megatron's local layers do, and give them the dtype that Transformer Engine would."""
            target.to(source.dtype)
            apply = llama.io.apply_transforms
            names = {
                "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
                "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
            }

            def apply_renamed(source: Any, target: Any, mapping: dict[str, str], transforms: Any) -> Any:
                for hf, megatron in mapping.items():
                    prefix, _, module = megatron.partition("layers.*.")
                    mapping[hf] = f"{prefix}layers.*.{names[module]}" if module in names else megatron
                return apply(source, target, mapping=mapping, transforms=transforms)

            llama.io.apply_transforms = apply_renamed
            try:
                return super().convert_state(source, target)
            finally:
                llama.io.apply_transforms = apply

    imported = time.perf_counter() - begun
    with megatron_on_cpu():
        OnCpu(str(source)).apply(target)
    return imported


def with_ours(source: Path, target: Path) -> float:
    """Convert with ``pvs convert``, verification included; return the seconds that the imports took."""
    begun = time.perf_counter()
    import torch

    from nemo_pvs.checkpoints.stream import convert

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
    import shutil

    import torch

    from nemo_pvs.checkpoints.megatron import NemoSource
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
    for name in ours._parts:
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
