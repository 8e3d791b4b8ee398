"""Depth pruning of SmolLM2-135M by each method: loss without retraining, and the work to find the layers.

    python -m tests.benchmarks.depth_methods [--keep 24 14] [--samples 8] [--sequence-length 128] [--folder DIR]

Layers are chosen on one part of the text and the losses in the table are measured on another. Greedy removal for few
layers is the beginning of that for many, so it is run once; its seconds are shared out by layer forwards.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.data.corpus import WIKIPEDIA_SAMPLE, read_documents
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan, format_ranges
from nemo_pvs.pruning.structured.depth import plan_depth, plan_individual, scan_windows
from nemo_pvs.pruning.structured.greedy import plan_greedy, scan_greedy
from nemo_pvs.pruning.structured.shortgpt import plan_shortgpt
from nemo_pvs.system.progress import console, progress


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--parent", default="smollm2-135m", help="as in a recipe")
    options.add_argument("--keep", type=int, nargs="+", default=[24, 14], help="numbers of layers to prune to")
    options.add_argument("--samples", type=int, default=8)
    options.add_argument("--sequence-length", type=int, default=128)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pvs_benchmark_parent")
    given = options.parse_args()
    folder = given.folder if given.folder.is_dir() else prepare_parent(given.parent, given.folder)
    source = open_source(folder)
    chosen_on, measured_on = texts(folder, given.samples, given.sequence_length)
    layers = shape_of(source).layers
    table = Table("layers", "method", "loss", "removed", "forwards", "one by one", "share", "seconds", box=None)

    def row(plan: Plan, method: str, ours: float, reference: float, seconds: float) -> None:
        loss = perplexity(PrunedSource(source, plan), measured_on, compute=Compute(dtype=torch.bfloat16))["loss"]
        removed = format_ranges([layer for layer in range(layers) if layer not in plan.keep_layers])
        table.add_row(
            str(plan.target.layers),
            method,
            f"{loss:.3f}",
            removed,
            f"{ours:,.0f}",
            f"{reference:,.0f}",
            f"{ours / reference:.0%}",
            f"{seconds:,.0f}",
        )

    dense = perplexity(source, measured_on, compute=Compute(dtype=torch.bfloat16))["loss"]
    table.add_row(str(layers), "dense", f"{dense:.3f}", "", "", "", "", "")
    scores, calibration_seconds = timed(lambda: calibrate(source, chosen_on))
    single, single_seconds = timed(lambda: scan(source, chosen_on, 1))
    with progress("greedy", "layer passes") as show:
        most = layers - min(given.keep)
        greedy, greedy_seconds = timed(
            lambda: scan_greedy(source, chosen_on, most, compute=Compute(dtype=torch.bfloat16), progress=show)
        )
    for keep in given.keep:
        remove = layers - keep
        windows, seconds = timed(lambda remove=remove: scan(source, chosen_on, remove))
        row(plan_depth(windows), "contiguous", windows.layer_forwards, windows.reference_layer_forwards, seconds)
        some = greedy.first(remove)
        share = some.layer_forwards / greedy.layer_forwards
        row(plan_greedy(some), "greedy", some.layer_forwards, some.reference_layer_forwards, share * greedy_seconds)
        row(
            plan_individual(single, remove),
            "individual",
            single.layer_forwards,
            single.reference_layer_forwards,
            single_seconds,
        )
        row(plan_shortgpt(scores, remove), "shortgpt", layers, layers, calibration_seconds)
    console.print(table)


def scan(source: WeightSource, tokens: TokenSet, remove: int) -> object:
    """Scan windows in bf16, four times as fast as fp32 where the processor has instructions for it."""
    with progress(f"windows of {remove}", "layer passes") as show:
        return scan_windows(source, tokens, remove, compute=Compute(dtype=torch.bfloat16), progress=show)


def texts(folder: Path, samples: int, sequence_length: int) -> tuple[TokenSet, TokenSet]:
    """Return windows to choose layers on, and as many from other articles to measure losses on."""
    tokenizer = load_tokenizer(folder)
    documents = [document.text for document in read_documents(WIKIPEDIA_SAMPLE)]
    middle = len(documents) // 2
    return tuple(  # type: ignore[return-value]
        TokenSet.from_documents(
            part,
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            samples=samples,
            sequence_length=sequence_length,
            seed=0,
            data_set=WIKIPEDIA_SAMPLE,
        )
        for part in (documents[:middle], documents[middle:])
    )


def timed(work: Callable) -> tuple:
    """Return a result and the seconds that it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


if __name__ == "__main__":
    main()
