"""What holding masks costs: training steps with and without them by turns, in one run of NeMo and Megatron.

    python -m tests.benchmarks.masked_training [--hidden 512] [--layers 6] [--tokens-per-step 1024] [--steps 40]

Every weight is masked at random with one half kept; the cost does not depend on which. It is a cost by weight, whereas
a step costs by weight and token, so that few tokens in a step and one rank for all weights are the hard case.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.progress import console
from nemo_pvs.training.job import TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.masked_source import MaskedSource
from tests.megatron.ranks import run_ranks, write_tokens

_SEQUENCE = 128
_WARM_UP = 4
_TURNS = (False, True, True, False)
"""Whether masks are held, so that neither half has the earlier steps."""


@dataclass(frozen=True)
class Cost:
    dense_seconds: float
    """Median of a step without masks."""
    masked_seconds: float
    """Median of a step with them."""
    mask_seconds: float
    """Median of what the masks alone take in a step, both times that they are applied."""
    weights: int
    """In masked matrices, of this rank."""
    mask_bytes: int
    model_bytes: int
    """Weights, gradients and both moments of all weights, fp32."""


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--tokens-per-step", type=int, default=1024, help=f"a multiple of {_SEQUENCE}")
    options.add_argument("--steps", type=int, default=40)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = sparse_job(Path(folder), given.hidden, given.layers, given.tokens_per_step, given.steps)
        [cost] = run_ranks(1, measure, job)
    table = Table("holding masks", "")
    table.add_row("masked weights", f"{cost.weights / 1e6:,.1f} M")
    table.add_row("step, dense", f"{cost.dense_seconds * 1e3:,.1f} ms")
    table.add_row("step, masked", f"{cost.masked_seconds * 1e3:,.1f} ms")
    table.add_row("masked / dense", f"{cost.masked_seconds / cost.dense_seconds:.4f}")
    table.add_row("of which masks alone", f"{cost.mask_seconds / cost.dense_seconds:.2%}")
    table.add_row("bits a masked weight", f"{8 * cost.mask_bytes / cost.weights:.3f}")
    table.add_row("masks / weights, gradients and moments", f"{cost.mask_bytes / cost.model_bytes:.2%}")
    console.print(table)


def sparse_job(folder: Path, hidden: int, layers: int, tokens_per_step: int, steps: int) -> TrainingJob:
    """Return a run of a sparse model in fp32 with the distributed optimizer."""
    heads = hidden // 64
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 64,
    }
    dense = HuggingFaceSource(save_tiny_tokenizer(make_tiny_llama(folder / "model", **sizes)))
    write_nemo(MaskedSource(dense), folder / "initial")
    samples = tokens_per_step // _SEQUENCE
    text = torch.randint(3, 128, (steps * tokens_per_step + _SEQUENCE + 1,)).tolist()
    (folder / "run").mkdir()
    return TrainingJob(
        name="benchmark",
        folder=folder / "run",
        initial=folder / "initial",
        data={
            "train": write_tokens(folder / "train", text),
            "validation": write_tokens(folder / "validation", text[: tokens_per_step + 1]),
        },
        layout=Parallelism(),
        training=Training(
            tokens=steps * tokens_per_step,
            sequence_length=_SEQUENCE,
            global_batch_size=samples,
            micro_batch_size=samples,
            learning_rate=1e-4,
            precision="fp32",
            validations=1,
            validation_samples=samples,
            checkpoints=1,
        ),
    )


def measure(job: TrainingJob) -> Cost:
    """Train as the only rank, with masks in every other pair of steps."""
    import os

    import lightning.pytorch as pl

    from nemo_pvs.megatron import rank
    from nemo_pvs.megatron.masks.rank_masks import PackedMask

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    zero_pruned = PackedMask.zero_pruned
    spent = 0.0

    def timed(mask, values):
        nonlocal spent
        began = time.perf_counter()
        zero_pruned(mask, values)
        spent += time.perf_counter() - began

    seconds: dict[bool, list[float]] = {True: [], False: []}
    masks: list[float] = []
    sizes: list[int] = []

    class TakeTurns(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            nonlocal spent
            self.masked = _TURNS[trainer.global_step % len(_TURNS)]
            PackedMask.zero_pruned = timed if self.masked else lambda mask, values: None
            spent = 0.0
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer, *_):
            taken = time.perf_counter() - self.began
            if trainer.global_step > _WARM_UP:
                seconds[self.masked].append(taken)
                masks.extend([spent] if self.masked else [])
            # Weights that grew back without masks would fail the check that ends the run; here they may.
            PackedMask.broken = lambda mask, values: 0

        def on_train_end(self, trainer, *_):
            shards = next(one for one in trainer.callbacks if hasattr(one, "masked") and one is not self).masked.shards
            sizes.append(sum(shard.mask.weights for shard in shards))
            sizes.append(sum(shard.mask.bits.numel() for shard in shards))
            sizes.append(4 * 4 * sum(weight.numel() for weight in trainer.strategy.megatron_parallel.parameters()))

    original = rank.pretrain_recipe

    def with_turns(job):
        recipe = original(job)
        recipe.trainer.callbacks.insert(0, TakeTurns())
        return recipe

    rank.pretrain_recipe = with_turns
    rank.train_on_cpu(job)
    return Cost(*(statistics.median(times) for times in (seconds[False], seconds[True], masks)), *sizes)


if __name__ == "__main__":
    main()
