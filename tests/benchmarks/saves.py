"""What saving the distributed optimizer's state costs, in each of Megatron's forms, with several ranks of DP.

    python -m tests.benchmarks.saves [--ranks 4] [--hidden 512] [--layers 4] [--repeat 3]

Memory is what all ranks take for a save on top of what they have, as a multiple of the state itself (fp32 weights and
two moments, 12 bytes per parameter). On a GPU each rank copies what it writes to the host besides.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.system.progress import console
from nemo_pvs.training.job import TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import tiny_job
from tests.megatron.ranks import run_ranks

FORMS = {
    "each rank its part": (False, False),
    "gathered by one rank": (True, True),
    "gathered by every rank": (True, False),
}
"""Whether the checkpoint can be resumed at another TP x PP, and whether Megatron saves memory for that."""


class Cost(NamedTuple):
    seconds: float
    """Until training can go on."""
    memory: float
    """Of all ranks together, as a multiple of the state's size."""


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--repeat", type=int, default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(make_job(Path(folder), given.ranks, given.hidden, given.layers), given.repeat)
    table = Table("state is saved", "seconds", "ratio", "memory of all ranks / state")
    first = costs[next(iter(FORMS))]
    for form, cost in costs.items():
        table.add_row(form, f"{cost.seconds:.2f}", f"{cost.seconds / first.seconds:.1f}", f"{cost.memory:.1f}")
    console.print(table)


def make_job(folder: Path, ranks: int, hidden: int, layers: int) -> TrainingJob:
    """Return a run of one step in bf16, whose optimizer then has a state."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    model = save_tiny_tokenizer(make_tiny_llama(folder / "model", **sizes))
    training = {"precision": "bf16", "validations": 1, "checkpoints": 1, "micro_batch_size": 1}
    job = tiny_job(folder, model, steps=1, global_batch_size=8, **training)
    return replace(job, layout=Parallelism(data_parallel=ranks))


def measure(job: TrainingJob, repeat: int) -> dict[str, Cost]:
    """Return what a save costs in each form; the median of several."""
    job.folder.mkdir()
    of_ranks = run_ranks(job.layout.processes, _rank, job, repeat)
    return {
        form: Cost(
            statistics.median(max(rank[form][index][0] for rank in of_ranks) for index in range(repeat)),
            statistics.median(sum(rank[form][index][1] for rank in of_ranks) for index in range(repeat)),
        )
        for form in FORMS
    }


def _rank(job: TrainingJob, repeat: int) -> dict[str, list[tuple[float, float]]]:
    """Train a step, save several times in each form, and return (seconds, memory / state) of this rank's saves."""
    import os
    import time

    import lightning.pytorch as pl

    from nemo_pvs.megatron import rank

    costs: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            state = 12 * sum(parameter.numel() for parameter in module.parameters())
            for index in range(repeat + 1):  # the first ones also start the writer's helper
                for form, (reshardable, efficient) in FORMS.items():
                    trainer.strategy.ckpt_optim_fully_reshardable = reshardable
                    trainer.strategy.distrib_optim_fully_reshardable_mem_efficient = efficient
                    trainer.strategy.barrier()
                    before = _reset_peak()
                    begun = time.perf_counter()
                    trainer.save_checkpoint(job.folder / f"{form}-{index}.ckpt")
                    trainer.strategy.barrier()
                    cost = time.perf_counter() - begun, (_memory("VmHWM") - before) / state
                    costs[form] += [cost] if index else []

    original = rank.pretrain_recipe

    def with_saves(job):
        recipe = original(job)
        recipe.trainer.callbacks.append(Save())
        return recipe

    rank.pretrain_recipe = with_saves
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    rank.train_on_cpu(job)
    return costs


def _reset_peak() -> int:
    """Reset the peak of this process's memory, and return its current memory in bytes.

    Memory that was freed is first given back to the system: a save that reuses it would seem to need none.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


if __name__ == "__main__":
    main()
