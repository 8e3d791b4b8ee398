"""Calibration and every pruning method on a large model of random numbers: memory, and seconds a layer.

    python -m tests.benchmarks.calibration_8b [--layers 2] [--shape llama31_8b] [--only flap] --folder DIR

Each runs in a process of its own, on 4 windows of 128 random tokens, and reads every tensor of the pruned model once,
as a writer would; nothing is written but what a method needs to go on after an interruption. The folder needs disk
for the model (16 GB for 32 layers) and as much again for the sparse methods, and keeps the model for the next time.
With two layers memory is that of any number of them: one layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.prune import prune
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.pruning.request import PruneRequest
from nemo_pvs.system.progress import console, progress
from tests.benchmarks.conversion import SHAPES, make_input
from tests.benchmarks.llm_compressor import random_tokens
from tests.benchmarks.measure import Measured, forget_cached, measure
from tests.benchmarks.methods import METHODS


def options_of(method: str, shape: Shape) -> dict[str, Any]:
    """Return typical options: a quarter of a size, a fifth of the layers' weights, or every other weight."""
    fewer = {"layers": max(1, shape.layers * 3 // 4), "hidden": shape.hidden * 3 // 4, "ffn": shape.ffn * 9 // 14}
    names = {
        "minitron-depth": ("layers",),
        "shortgpt": ("layers",),
        "minitron-width": ("hidden", "ffn"),
        "minitron-joint": ("layers", "hidden", "ffn"),
    }
    if method in names:
        return {name: fewer[name] for name in names[method]}
    if method in {"magnitude", "wanda", "sparsegpt"}:
        return {"sparsity": "2:4"}
    return {"ratio": 0.2, "of": "body", "iterations": 5} if method == "adapt-pruner" else {"ratio": 0.2}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama31_8b")
    parser.add_argument("--layers", type=int, help="another depth")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--only", action="append", choices=METHODS, help="may be repeated")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_calibration"))
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    shape = shape.replace(layers=given.layers or shape.layers)
    model, size = given.folder / f"hf-{shape.layers}-layers", (given.samples, given.sequence_length)
    if not model.exists():
        console.print("make the input")
        measure(make_input, shape, model)
    elif shape_of(HuggingFaceSource(model)) != shape:
        raise SystemExit(f"{model} holds another model; remove it.")
    results = {}
    for name in ("calibrate", *(given.only or METHODS)):
        work = calibrated if name == "calibrate" else pruned
        forget_cached(model)
        results[name] = measure(work, name, model, given.folder, size)
        console.print(f"{name}: {results[name].seconds:.1f} s")
    console.print(table(shape, size, results))


def calibrated(_: str, model: Path, folder: Path, size: tuple[int, int]) -> None:
    """Measure the scores that most methods start from."""
    source = HuggingFaceSource(model)
    with progress("calibrate", "layers") as show:
        scores = calibrate(source, random_tokens(size, shape_of(source).vocab, seed=0), progress=show)
    scores.save(folder / "scores", overwrite=True)


def pruned(method: str, model: Path, folder: Path, size: tuple[int, int]) -> None:
    """Prune, and read what a writer would."""
    source = HuggingFaceSource(model)
    shape = shape_of(source)
    shutil.rmtree(folder / "work", ignore_errors=True)  # of a run that was killed
    tokens = random_tokens(size, shape.vocab, seed=0)

    def scores() -> Scores:
        with_gradients = method_named(method).gradients  # measured here, so that their cost shows
        return calibrate(source, tokens, gradients=True) if with_gradients else Scores.load(folder / "scores", source)

    job = PruneRequest(
        source=source,
        options=method_named(method).options(**options_of(method, shape)),
        tokens=lambda: tokens,
        scores=scores,
        check=lambda _: None,
        work_folder=folder / "work",
        progress=progress,
        say=console.print,
    )
    result = prune(method, job).pruned.source
    masks = masks_of(result)
    for name in Layout.for_config(result.config).parts(shape_of(result)):
        tensor = result.read(name)
        if name in masks.names and 2 * int(masks.read(name).sum()) != tensor.numel():
            raise SystemExit(f"{method} does not keep half of {name}")
    shutil.rmtree(folder / "work", ignore_errors=True)


def table(shape: Shape, size: tuple[int, int], results: dict[str, Measured]) -> Table:
    parts = Layout.for_config({"architectures": ["LlamaForCausalLM"]}).parts(shape)
    layer = sum(2 * torch.Size(part.size(shape)).numel() for part, entry in parts.values() if entry.layer == 0)
    embedding = 2 * shape.vocab * shape.hidden
    sizes = f"a layer has {layer / 1e6:,.0f} MB, the embedding {embedding / 1e6:,.0f} MB"
    made = Table(title=f"{shape}; {size[0]} x {size[1]} tokens; {sizes}")
    for column in ("", "s", "s a layer", "CPU s", "peak MB", "before MB", "options"):
        made.add_column(column, justify="right" if column not in {"", "options"} else "left")
    for name, measured in results.items():
        chosen = options_of(name, shape) if name in METHODS else {}
        made.add_row(
            name,
            f"{measured.seconds:.1f}",
            f"{measured.seconds / shape.layers:.1f}",
            f"{measured.cpu_seconds:.1f}",
            f"{measured.peak / 1e6:,.0f}",
            f"{measured.baseline / 1e6:,.0f}",
            " ".join(f"--{option} {value}" for option, value in chosen.items()),
        )
    return made


if __name__ == "__main__":
    main()
