"""How well a search's shortlist is chosen: every shape of a grid of SmolLM2-135M, measured and estimated in two ways.

    python -m tests.benchmarks.architecture_search [--parameters 100e6] [--samples 4] [--sequence-length 128]

Compares the estimate of ``search`` (sizes measured one by one, added up) with the importance that a shape keeps (the
product of the shares of hidden and FFN channels' energy and of block influence): rank correlation with the loss.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.search.grid import Grid, SizeLimit, flops_at, legal_shapes
from nemo_pvs.pruning.search.search import search
from nemo_pvs.system.progress import console, progress
from tests.benchmarks.depth_methods import texts


def main() -> None:
    """Print the table and the two correlations."""
    options = argparse.ArgumentParser()
    options.add_argument("--parameters", type=float, default=100e6)
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--sequence-length", type=int, default=128)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pvs_benchmark_parent")
    given = options.parse_args()
    folder = given.folder if given.folder.is_dir() else prepare_parent("smollm2-135m", given.folder)
    source = open_source(folder)
    scored_on, measured_on = texts(folder, given.samples, given.sequence_length)
    scores = calibrate(source, scored_on)
    grid = Grid.of(scores.shape, max_width_pruning=0.5)
    shapes = legal_shapes(scores.shape, grid, SizeLimit(parameters=given.parameters))
    flops = flops_at(given.sequence_length)
    with tempfile.TemporaryDirectory() as state, progress("search", "layers") as show:
        settings = {"state": Path(state) / "search.json", "dtype": torch.bfloat16, "progress": show}
        estimated = search(source, scores, measured_on, shapes, flops, shortlist=1, **settings)
        every = search(source, scores, measured_on, shapes, flops, shortlist=None, **settings)
    estimates = {candidate.shape: candidate.estimated_loss for candidate in estimated.candidates}
    kept = kept_importance(scores)
    table = Table("layers", "hidden", "ffn", "loss", "estimated", "importance kept", box=None)
    for candidate in every.candidates:
        shape, estimate = candidate.shape, estimates[candidate.shape]
        sizes = map(str, (shape.layers, shape.hidden, shape.ffn))
        table.add_row(*sizes, f"{candidate.loss:.3f}", f"{estimate:.3f}", f"{kept(shape):.3f}")
    console.print(table)
    losses = [candidate.loss for candidate in every.candidates]
    by_sizes = rank_correlation([estimates[candidate.shape] for candidate in every.candidates], losses)
    by_importance = rank_correlation([-kept(candidate.shape) for candidate in every.candidates], losses)
    console.print(f"rank correlation with the loss: estimate {by_sizes:.2f}, importance kept {by_importance:.2f}")


def kept_importance(scores: Scores) -> Callable[[Shape], float]:
    """Return the share of importance that a shape keeps: an estimate that needs no forward pass."""

    def shares(importance: torch.Tensor) -> torch.Tensor:
        return importance.sort(dim=-1, descending=True).values.cumsum(-1) / importance.sum(-1, keepdim=True)

    hidden = shares(scores.tensors["hidden.energy"])
    ffn = shares(scores.tensors["ffn.energy"]).mean(dim=0)
    layers = shares(scores.tensors["block_influence"])
    return lambda shape: math.prod(
        float(curve[size - 1]) for curve, size in ((hidden, shape.hidden), (ffn, shape.ffn), (layers, shape.layers))
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rho."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()
