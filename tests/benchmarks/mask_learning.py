"""What learning masks costs: steps with gates and masks beside plain ones of the same model, in NeMo and Megatron.

    python -m tests.benchmarks.mask_learning [--hidden 384] [--layers 4] [--vocab 4096] [--steps 16]

The model computes what it always does, and a few products with vectors more.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from nemo_pvs.checkpoints.megatron import NemoSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.progress import console
from nemo_pvs.recipe import Layout
from nemo_pvs.recipe_sheared import MaskLearning
from nemo_pvs.training.job import LearnedMasks, TrainingJob
from tests.benchmarks.distillation import distilled_job, seconds_of_a_step

_LAYOUTS = {"one process": {}, "TP=2": {"tensor_parallel": 2}, "PP=2": {"pipeline_parallel": 2}}


@dataclass(frozen=True)
class Cost:
    plain_seconds: float
    """Median of a step."""
    masked_seconds: float
    """Median of one that learns masks of every kind of unit."""


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--hidden", type=int, default=384)
    options.add_argument("--layers", type=int, default=4, help="a multiple of 2")
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--steps", type=int, default=16)
    given = options.parse_args()
    table = Table("layout", "plain (ms)", "learning masks (ms)", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        job = distilled_job(Path(folder), given.hidden, 2 * given.layers, given.vocab, given.steps)
        for name, sizes in _LAYOUTS.items():
            cost = measure(job, Layout(**sizes))
            plain, masked = cost.plain_seconds, cost.masked_seconds
            table.add_row(name, f"{plain * 1e3:,.0f}", f"{masked * 1e3:,.0f}", f"{masked / plain:.2f}")
    console.print(table)


def measure(job: TrainingJob, layout: Layout) -> Cost:
    """Train with and without masks, one after the other."""
    shape = shape_of(NemoSource(job.initial))
    target = shape.replace(
        hidden=shape.hidden // 2, ffn=shape.ffn // 2, kv_groups=shape.kv_groups - 1, layers=shape.layers - 1
    )
    plain = replace(job, teacher=None, layout=layout)
    return Cost(
        *(seconds_of_a_step(replace(plain, masks=masks)) for masks in (None, LearnedMasks(target, MaskLearning())))
    )


if __name__ == "__main__":
    main()
