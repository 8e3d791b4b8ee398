"""Which query heads to remove inside KV groups: Minitron's importance, others, and random heads, on SmolLM2-135M.

    python -m tests.benchmarks.query_heads [--samples 32] [--sequence-length 256] [--folder DIR]

Prints the table of docs/methods.md. Every row but the last removes one of the three heads of every group; text and
losses (nats per token, without retraining) are those of ``tests.benchmarks.methods``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.fetch import prepare_parent
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.flap import channel_scores
from nemo_pvs.pruning.structured.width import plan_width
from tests.benchmarks.structured_methods import texts


def plans(scores: Scores) -> Iterator[tuple[str, Plan]]:
    """Yield what each row removes."""
    parent = scores.shape
    fewer = parent.replace(heads=parent.heads - parent.kv_groups)
    target = f"--target heads={fewer.heads}"
    yield f"`{target}`", plan_width(scores, fewer)
    yield f"`{target} --merge-heads`", plan_width(scores, fewer, merge_heads=True)
    yield f"`{target} --aggregation meanabs_l2`", plan_width(scores, fewer, "meanabs_l2")
    heads = scores.tensors["heads.energy"]
    others = {
        "the least important heads stay": -heads,
        "random heads": torch.rand(heads.shape, generator=torch.Generator().manual_seed(0)).double(),
        "heads by FLAP's score, without biases": channel_scores(scores, "attention", "WIFV")
        .unflatten(1, (parent.heads, -1))
        .sum(dim=2),
    }
    for name, importance in others.items():
        yield name, plan_width(Scores({**scores.tensors, "heads.energy": importance}, scores.manifest), fewer)
    groups = parent.kv_groups - 1
    yield f"`--target kv_groups={groups}`", plan_width(scores, parent.replace(kv_groups=groups))


def row(source: WeightSource, plan: Plan | None, shape: Shape, test: TokenSet) -> tuple[str, str]:
    """Return the parameters in millions and the loss of what a plan keeps, or of the whole model."""
    model, kept = (source, shape) if plan is None else (PrunedSource(source, plan), plan.target)
    return f"{kept.parameters / 1e6:.1f}", f"{perplexity(model, test)['loss']:.2f}"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--samples", type=int, default=32, help="calibration windows; half as many are predicted")
    options.add_argument("--sequence-length", type=int, default=256)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pvs_benchmark_parent")
    given = options.parse_args()
    folder = given.folder if given.folder.is_dir() else prepare_parent("smollm2-135m", given.folder)
    source = open_source(folder)
    calibration, test = texts(folder, given.samples, given.sequence_length)
    scores = calibrate(source, calibration)
    table = Table("removed", "parameters (M)", "loss", box=box.MARKDOWN)
    for name, plan in [("dense", None), *plans(scores)]:
        table.add_row(name, *row(source, plan, scores.shape, test))
    Console(width=120, highlight=False).print(table)


if __name__ == "__main__":
    main()
