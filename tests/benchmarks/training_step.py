"""A training step of our recipe and one of NeMo's own Llama recipe: same shape, data, batch, kernels and machine.

    python -m tests.benchmarks.training_step [--shape llama31_8b/4b-width] [--layers 16] [--sequence-length 4096]

On a GPU both run with Transformer Engine in bf16; on a CPU both with the parts that replace its kernels. On one rank,
a model takes 18 bytes a parameter beside its activations: 4.5 B parameters need more than 80 GB, ``--layers`` fewer.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nemo_pvs.checkpoints.fetch import SMOLLM2
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.model.layout import Layout as WeightLayout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.presets import target_presets
from nemo_pvs.system.progress import console
from nemo_pvs.training.job import TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import tiny_job
from tests.megatron.ranks import run_ranks

_WARM_UP = 3
_SMOLLM2 = Shape(layers=30, hidden=576, ffn=1536, heads=9, kv_groups=3, head_dim=64, vocab=49152, tied=True)
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bf16 of the SXM forms, as NVIDIA states them."""


@dataclass(frozen=True)
class Steps:
    seconds: float
    """Median of a step."""
    peak_bytes: int
    """Of the GPU's allocator; without one, of the process."""
    loss: float
    """Of the last step."""


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--shape", default=SMOLLM2, choices=[SMOLLM2, *target_presets()], metavar="PRESET")
    options.add_argument("--layers", type=int)
    options.add_argument("--sequence-length", type=int, default=128)
    options.add_argument("--batch", type=int, default=8, help="sequences a step, one micro-batch each")
    options.add_argument("--steps", type=int, default=12)
    given = options.parse_args()
    shape = _SMOLLM2 if given.shape == SMOLLM2 else target_presets()[given.shape].target
    shape = shape.replace(layers=given.layers or shape.layers)
    with tempfile.TemporaryDirectory() as folder:
        job = plain_job(Path(folder), shape, given.sequence_length, given.batch, given.steps)
        found = {name: run_ranks(1, train, job, name)[0] for name in ("nemo_pvs", "NeMo")}
    console.print(_table(shape, job, found))


def plain_job(folder: Path, shape: Shape, sequence_length: int, batch: int, steps: int) -> TrainingJob:
    """Return a run of random weights of a shape, on random tokens, with a micro-batch of one sequence."""
    assets = save_tiny_tokenizer(make_tiny_llama(folder / "model"))
    stock = json.loads((assets / "config.json").read_text())
    config = WeightLayout.for_config(stock).config(shape, {**stock, "max_position_embeddings": sequence_length})
    drawn = RandomSource(config, 0, tuple(assets.glob("tokenizer*")), torch.bfloat16)
    text = torch.randint(3, 128, ((steps + 1) * batch * sequence_length + 1,)).tolist()
    job = tiny_job(
        folder,
        drawn,
        steps=steps,
        text=text,
        sequence_length=sequence_length,
        global_batch_size=batch,
        micro_batch_size=1,
        validation_samples=batch,
        validations=1,
        precision="auto",
    )
    job.folder.mkdir()
    return job


def train(job: TrainingJob, name: str) -> Steps:
    """Train as the only rank, by our recipe or by NeMo's; nothing is validated or saved."""
    import os

    import fiddle
    import lightning.pytorch as pl

    from nemo_pvs.megatron.pretrain import pretrain_recipe
    from nemo_pvs.megatron.rank import pretrain_on_cpu
    from nemo_pvs.training.machine import Machine

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            _wait()
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            _wait()
            seconds.append(time.perf_counter() - self.began)
            losses.append(float(outputs["loss"]))

    machine = Machine.here()
    recipe = pretrain_recipe(job, machine)
    if name == "NeMo":
        recipe = _of_nemo(job, recipe, machine)
    recipe.trainer.limit_val_batches = 0.0
    recipe.trainer.val_check_interval = job.training.steps
    recipe.log.ckpt = None
    recipe.trainer.enable_checkpointing = False
    recipe.trainer.callbacks.append(Clock())
    if machine.gpu:
        fiddle.build(recipe)()
        peak = torch.cuda.max_memory_allocated()
    else:
        pretrain_on_cpu(**{key: fiddle.build(value) for key, value in recipe.__arguments__.items()})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Steps(statistics.median(seconds[_WARM_UP:]), peak, losses[-1])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _of_nemo(job: TrainingJob, ours: Any, machine: Any) -> Any:
    """Return NeMo's recipe of Llama 3.1, for the model and the data of ours, on one rank."""
    from nemo.collections.llm.recipes import llama31_8b

    from nemo_pvs.megatron.pretrain import mixed_precision

    recipe = llama31_8b.pretrain_recipe(dir=str(job.folder / "stock"), num_gpus_per_node=1)
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    kept = ("vocab_size", "share_embeddings_and_output_weights", "seq_length", "make_vocab_size_divisible_by")
    for name in (*sizes, *kept):
        setattr(recipe.model.config, name, getattr(ours.model.config, name))
    recipe.data = ours.data
    recipe.trainer.strategy.context_parallel_size = 1
    recipe.trainer.max_steps = job.training.steps
    if not machine.gpu:
        recipe.model.config = ours.model.config
        recipe.trainer.accelerator = "cpu"
        recipe.trainer.plugins = mixed_precision(machine.precision("auto"))
        recipe.trainer.strategy.ckpt_async_save = False
        for switch in ("overlap_grad_reduce", "overlap_param_gather", "average_in_collective"):
            setattr(recipe.trainer.strategy.ddp, switch, False)
        recipe.optim.config.bf16 = ours.optim.config.bf16
        recipe.optim.config.params_dtype = ours.optim.config.params_dtype
    return recipe


def _table(shape: Shape, job: TrainingJob, found: dict[str, Steps]) -> Table:
    table = Table("", *found, "ratio")
    ours, theirs = found["nemo_pvs"], found["NeMo"]
    tokens = job.training.tokens_per_step
    flops = tokens * shape.flops_per_token(sequence_length=job.training.sequence_length, training=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
    peak = next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)
    table.add_row("parameters (M)", *[f"{shape.parameters / 1e6:,.1f}"] * 2)
    seconds = [one.seconds for one in found.values()]
    table.add_row("step (s)", *(f"{one:.3f}" for one in seconds), f"{ours.seconds / theirs.seconds:.3f}")
    table.add_row("tokens/s", *(f"{tokens / one:,.0f}" for one in seconds))
    table.add_row(f"TFLOP/s on {name}", *(f"{flops / one / 1e12:,.3f}" for one in seconds))
    if peak:
        table.add_row("MFU", *(f"{flops / one / peak:.1%}" for one in seconds))
    table.add_row(
        "peak memory (GB)",
        *(f"{one.peak_bytes / 1e9:.2f}" for one in found.values()),
        f"{ours.peak_bytes / theirs.peak_bytes:.3f}",
    )
    return table


if __name__ == "__main__":
    main()
