"""What EfficientLLM costs: steps in which units are watched, and go, beside plain ones, in NeMo and Megatron.

    python -m tests.benchmarks.pruning_aware [--hidden 384] [--layers 4] [--vocab 4096] [--steps 16]

Watching is a product of weights and gradients a step; a removal adds a Hessian for each layer that makes up for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from nemo_pvs.checkpoints.megatron import NemoSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.progress import console
from nemo_pvs.recipe import Layout
from nemo_pvs.recipe_efficient import PruningAware
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from tests.benchmarks.distillation import _train, distilled_job
from tests.parallel.ranks import run_ranks

_WARM_UP = 4
_LAYOUTS = {"one process": {}, "TP=2": {"tensor_parallel": 2}, "DP=2": {"data_parallel": 2}}
_KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "watched": {"uniform": False, "removals": 1},
    "an FFN channel of a layer goes": {"uniform": False, "compensate": False},
    "and is made up for": {"uniform": False},
    "one of every layer, made up for": {"uniform": True},
}


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--hidden", type=int, default=384)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--steps", type=int, default=16)
    given = options.parse_args()
    table = Table("layout", "step", "ms", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        job = distilled_job(Path(folder), given.hidden, 2 * given.layers, given.vocab, given.steps)
        for layout, sizes in _LAYOUTS.items():
            plain = 0.0
            for kind, settings in _KINDS.items():
                seconds = measure(job, Layout(**sizes), settings)
                plain = plain or seconds
                table.add_row(layout, kind, f"{seconds * 1e3:,.0f}", f"{seconds / plain:.2f}")
    console.print(table)


def measure(job: TrainingJob, layout: Layout, settings: dict[str, Any] | None) -> float:
    """Return the median seconds of a step; FFN channels go in each one, or in the last alone."""
    pruning = None
    if settings is not None:
        settings = dict(settings)
        shape, steps = shape_of(NemoSource(job.initial)), job.training.steps
        removals = settings.pop("removals", steps)
        each = 3 * shape.hidden * (shape.layers if settings["uniform"] else 1)
        pruning = PruningAware(
            parameters=shape.parameters - removals * each,
            tokens=job.training.tokens,
            start_tokens=(steps - removals) * job.training.tokens_per_step,
            least_hidden=shape.hidden,
            least_groups=shape.kv_groups,
            **settings,
        )
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        run = replace(job, folder=Path(folder), layout=layout, pruning=pruning, teacher=None)
        run.save()
        run_ranks(layout.processes, _train, run)
        measured = metrics.read(run.metrics).training[_WARM_UP:-1]
        return statistics.median(run.training.tokens_per_step / step["tokens_per_second"] for step in measured)


if __name__ == "__main__":
    main()
