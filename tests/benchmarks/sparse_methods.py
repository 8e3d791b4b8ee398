"""Sparse SmolLM2-135M by each method and pattern: perplexity without retraining, and the time to prune.

    python -m tests.benchmarks.sparse_methods [--samples 128] [--sequence-length 512] [--only METHOD] [--folder DIR]

One half of the articles calibrates, windows of the other half are predicted, half as many.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.table import Table

from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pruning.sparse.magnitude import MagnitudeSource
from nemo_pvs.pruning.sparse.sequential import prune_layers
from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.sparse.wanda import Wanda
from nemo_pvs.system.progress import console, progress
from tests.benchmarks.structured_methods import texts

METHODS = {
    "SparseGPT": (SparseGPT, "sequential"),
    "SparseGPT, dense calibration": (SparseGPT, "dense"),
    "Wanda": (Wanda, "sequential"),
    "Wanda, dense calibration": (Wanda, "dense"),
    "magnitude": (None, None),
}
SPARSITIES = ("0.5", "4:8", "2:4")


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--parent", default="smollm2-135m", help="as in a recipe")
    options.add_argument("--samples", type=int, default=128, help="calibration windows; half as many are predicted")
    options.add_argument("--sequence-length", type=int, default=512)
    options.add_argument("--only", action="append", choices=METHODS, help="a row of the table; may be repeated")
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pvs_benchmark_parent")
    given = options.parse_args()
    folder = given.folder if given.folder.is_dir() else prepare_parent(given.parent, given.folder)
    source = open_source(folder)
    calibration, test = texts(folder, given.samples, given.sequence_length)
    table = Table("perplexity (seconds to prune)", *SPARSITIES)
    table.add_row("dense", f"{evaluate(source, test):,.2f}", end_section=True)
    for name in given.only or ("SparseGPT", "Wanda", "magnitude"):
        table.add_row(name, *(cell(source, name, text, calibration, test) for text in SPARSITIES))
    console.print(table)


def cell(source: WeightSource, name: str, sparsity: str, calibration: TokenSet, test: TokenSet) -> str:
    """Prune, check the masks, and evaluate."""
    method, kind = METHODS[name]
    wanted = Sparsity.parse(sparsity)
    if method is None:
        return f"{evaluate(checked(MagnitudeSource(source, wanted)), test):,.2f}"
    with tempfile.TemporaryDirectory() as folder, progress(f"{name} {sparsity}", "sequences") as show:
        began = time.monotonic()
        sparse = prune_layers(
            source,
            calibration,
            method(wanted),
            Path(folder) / "work",
            calibration=kind,
            # Four times as fast as fp32 on processors that have it; statistics are fp32 all the same.
            compute=Compute(dtype=torch.bfloat16),
            progress=show,
            warn=console.print,
        )
        seconds = time.monotonic() - began
        return f"{evaluate(checked(sparse), test):,.2f} ({seconds:.0f} s)"


def checked(sparse: WeightSource) -> WeightSource:
    """Make sure that half of every matrix is masked, and that what is masked is zero."""
    masks = masks_of(sparse)
    for name in masks.names:
        mask, weight = masks.read(name), sparse.read(name)
        assert 2 * int(mask.sum()) == mask.numel()
        assert not weight[~mask].any()
    return sparse


def evaluate(source: WeightSource, test: TokenSet) -> float:
    """Return the perplexity; in bf16, as above."""
    return float(perplexity(source, test, compute=Compute(dtype=torch.bfloat16))["perplexity"])


if __name__ == "__main__":
    main()
