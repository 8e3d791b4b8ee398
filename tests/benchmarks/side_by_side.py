"""Trainings side by side with one thread each, compared with one at a time with all cores; glibc's memory kept or not.

    python -m tests.benchmarks.side_by_side [--hidden 48] [--layers 8] [--batch 16] [--steps 60] [--rounds 3]

On a CPU. Every contender trains the same job in each round, in launchers that stay. Its speed is that of all copies of
the job that it trains at the same time: the sum of the medians over their steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table

from nemo_pvs.system.progress import console
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.preemption import children
from nemo_pvs.training.trainer import Trainer
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import tiny_job

_SEQUENCE = 128
_VOCAB = 2048
_WARM_UP = 5
_KEEP = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
"""glibc keeps what large tensors used instead of returning it to the kernel."""


@dataclass
class Contender:
    """A way to train jobs."""

    jobs: int | None
    """As for ``Trainer``."""
    variables: Mapping[str, str]
    """For the environment of its launchers; an empty value removes one."""
    speeds: list[float] = field(default_factory=list)
    """Tokens per second of each round."""
    peak: int = 0
    """Most resident bytes of a rank."""


def contenders() -> dict[str, Contender]:
    """Return what is compared, the usual first."""
    return {
        "one, all cores": Contender(None, {"OMP_NUM_THREADS": "", **dict.fromkeys(_KEEP, "")}),
        "two, one thread each": Contender(2, dict.fromkeys(_KEEP, "")),
        "one, one thread": Contender(1, dict.fromkeys(_KEEP, "")),
        "one, one thread, memory kept": Contender(1, _KEEP),
    }


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--hidden", type=int, default=48)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--batch", type=int, default=16, help="sequences a step")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), given.hidden, given.layers, given.batch, given.steps)
        compared = contenders()
        compare(job, compared, given.rounds)
    table = Table("", "tokens/s", "ratio", "ratio of each round", "peak MB of a rank")
    usual = compared["one, all cores"]
    for name, contender in compared.items():
        ratios = [one / other for one, other in zip(contender.speeds, usual.speeds, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(contender.speeds):,.0f}",
            f"{statistics.median(ratios):.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in ratios),
            f"{contender.peak / 1e6:,.0f}",
        )
    console.print(table)
    console.print(f"load of this machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def make_job(folder: Path, hidden: int, layers: int, batch: int, steps: int) -> TrainingJob:
    """Return a run in fp32 on one rank, of a model with tied embeddings."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": hidden // 8,
        "vocab_size": _VOCAB,
        "tie_word_embeddings": True,
    }
    model = save_tiny_tokenizer(make_tiny_llama(folder / "model", **sizes), _VOCAB)
    text = torch.randint(3, _VOCAB, (steps * batch * _SEQUENCE + _SEQUENCE + 1,)).tolist()
    return tiny_job(
        folder,
        model,
        steps=steps,
        text=text,
        sequence_length=_SEQUENCE,
        global_batch_size=batch,
        micro_batch_size=batch,
        validation_samples=batch,
        validations=1,
        checkpoints=1,
    )


def compare(job: TrainingJob, compared: Mapping[str, Contender], rounds: int) -> None:
    """Train the job ``rounds`` times as each contender does; fill in what is measured."""
    with ExitStack() as stack:
        trainers = {
            name: stack.enter_context(Trainer(job.folder.with_name(f"launcher {name}") / "log", contender.jobs))
            for name, contender in compared.items()
        }
        for number in range(rounds):
            for name, contender in compared.items():
                jobs = [
                    replace(job, name=name, folder=job.folder.with_name(f"{name} {number} {copy}"))
                    for copy in range(contender.jobs or 1)
                ]
                with _environment(contender.variables), _peak(contender):
                    trainers[name].train_all(jobs)
                curves = [metrics.read(trained.metrics).training[_WARM_UP:] for trained in jobs]
                speeds = [statistics.median(point["tokens_per_second"] for point in curve) for curve in curves]
                contender.speeds.append(sum(speeds))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for processes that are started in the block; remove those that are empty."""
    before = {name: os.environ.get(name) for name in variables}

    def change(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)

    change(variables)
    try:
        yield
    finally:
        change(before)


@contextmanager
def _peak(contender: Contender) -> Iterator[None]:
    """Watch the memory of the ranks, which are the children of this process's children."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            for launcher in children(os.getpid()):
                for rank in children(launcher):
                    contender.peak = max(contender.peak, _resident(rank))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _resident(pid: int) -> int:
    """Return the most bytes that a process has had in memory; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
