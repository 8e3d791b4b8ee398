"""Callbacks of a run: metrics for people and reports, and checkpoints that include their context."""

from __future__ import annotations

import shutil
import time
from collections import deque
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core.parallel_state import get_data_parallel_world_size
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.io import IOMixin

from nemo_pvs.megatron.distillation.callback import EMBEDDINGS, HIDDEN, KL
from nemo_pvs.megatron.preemption import finish_saving
from nemo_pvs.training import metrics
from nemo_pvs.training.checkpoints import (
    KEPT,
    checkpoint_name,
    newest_sound,
    saved_checkpoints,
    set_aside,
    write_split,
)
from nemo_pvs.training.gpu_use import flops_of, gpu_use
from nemo_pvs.training.job import TrainingJob


class MetricsLog(pl.Callback, IOMixin):
    """Write each step's metrics as a line of JSON and print them as a line of text, on rank 0 only.

    Replaces NeMo's ProgressPrinter, whose timers run a collective on rank 0 alone and so deadlock. This callback only
    reads values that rank 0 already has; it runs no collective.
    """

    def __init__(self, path: str, tokens_per_step: int, total_steps: int, job: str = "", precision: str = "") -> None:
        """Write to ``path``.

        Args:
            path: The metrics file.
            tokens_per_step: Tokens of one optimizer step.
            total_steps: Steps of the run.
            job: File of the job, for the model FLOPs utilisation on GPUs.
            precision: ``bf16``, ``fp8`` or ``fp32``.
        """
        self.path = Path(path)
        self.tokens_per_step = tokens_per_step
        self.total_steps = total_steps
        self.job, self.precision = job, precision
        self._flops: int | None = None
        self._step_began = self._run_began = time.monotonic()
        self._learning_rate = 0.0
        self._speeds: deque[float] = deque(maxlen=metrics.PACE_STEPS)

    def on_train_start(self, trainer, pl_module):
        """Start the clock, after setup and loading."""
        if trainer.is_global_zero and self.job and torch.cuda.is_available():
            self._flops = flops_of(TrainingJob.load(Path(self.job)))
        self._step_began = self._run_began = time.monotonic()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Remember the learning rate: at the end of the step the schedule has already moved on to the next one."""
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Record loss, learning rate, gradient norm and speed of a step."""
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        values = trainer.callback_metrics
        record = {
            "kind": "training",
            "step": trainer.global_step,
            "tokens": trainer.global_step * self.tokens_per_step,
            "loss": float(values["reduced_train_loss"]),
            "learning_rate": self._learning_rate,
            "grad_norm": float(values["grad_norm"]),
            "tokens_per_second": self.tokens_per_step / (now - self._step_began),
            "seconds": now - self._run_began,
        }
        distillation = {"kl": KL, "hidden_loss": HIDDEN, "embedding_loss": EMBEDDINGS}
        record.update({key: float(values[name]) for key, name in distillation.items() if name in values})
        record.update(gpu_use(record["tokens_per_second"], self._flops, trainer.world_size, self.precision))
        metrics.append(self.path, record)
        self._speeds.append(record["tokens_per_second"])
        left = metrics.time_left((self.total_steps - record["step"]) * self.tokens_per_step, self._speeds)
        print(
            f"step {record['step']}/{self.total_steps}  tokens {record['tokens']:,}  loss {record['loss']:.4f}  "
            f"lr {record['learning_rate']:.2e}  grad norm {record['grad_norm']:.3f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  {left} left"
            + (f"  MFU {record['mfu']:.1%}" if "mfu" in record else "")
            + (f"  {record['peak_gigabytes']:.1f} GB" if "peak_gigabytes" in record else "")
            + (f"  KL {record['kl']:.4f}" if "kl" in record else "")
            + (f"  hidden {record['hidden_loss']:.4f}" if "hidden_loss" in record else ""),
            flush=True,
        )
        self._step_began = now

    def on_validation_batch_start(self, trainer, *args, **kwargs):
        """Give every validation step the same weight; Lightning would assume a batch size of 1 for the first."""
        trainer._results.batch_size = 1

    def on_validation_end(self, trainer, pl_module):
        """Record the validation loss and restart the clock, so that validation does not count as part of a step."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["val_loss"])
            metrics.append(
                self.path,
                {
                    "kind": "validation",
                    "step": trainer.global_step,
                    "tokens": trainer.global_step * self.tokens_per_step,
                    "loss": loss,
                },
            )
            print(f"step {trainer.global_step}/{self.total_steps}  validation loss {loss:.4f}", flush=True)
        self._step_began = time.monotonic()


class CheckpointCallback(nl.ModelCheckpoint):
    """NeMo's checkpoint callback, which also copies the initial checkpoint's ``context/`` into every checkpoint.

    The architecture never changes during a run, and that context names only stock NeMo classes, so every checkpoint
    of the run can be read without this package; NeMo's own context would name our layer and data classes. It is copied
    before the save is declared finished, because resuming needs it. The two newest checkpoints are kept
    (``training.checkpoints``), and those after the steps of ``keep``.

    During the run each rank saves its own part of the distributed optimizer's state, which needs no communication but
    can only be resumed at the same TP x PP. The last checkpoint, also before an exit on a signal, can be resumed in
    any layout: one data parallel rank gathers the state of all. ``tests/benchmarks/saves.py`` compares these.
    """

    def __init__(self, initial: str, keep: list[int], **kwargs):
        """Take the initial checkpoint, the steps to keep, and the arguments of NeMo's callback."""
        super().__init__(always_save_context=False, save_context_on_train_end=False, **kwargs)
        self.initial = initial
        self.keep = keep
        self.last_saved = 0.0
        self._stopping = False

    def on_train_start(self, trainer, pl_module):
        """Start the clock."""
        self.last_saved = time.monotonic()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
        """Save after a step whose checkpoint is to be kept."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if trainer.global_step in self.keep:
            self.save(trainer)

    def on_train_end(self, trainer, *args, **kwargs):
        """Save the last step, and wait until it is written."""
        super().on_train_end(trainer, *args, **kwargs)
        finish_saving(trainer)

    def save(self, trainer, *, stopping: bool = False) -> None:
        """Save a checkpoint now, unless there is one of this step.

        Args:
            trainer: The trainer.
            stopping: Whether the run then stops, and may be resumed in another layout.
        """
        self._stopping = stopping
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def setup(self, trainer, *args, **kwargs):
        """Move broken checkpoints out of the way; by now every rank has chosen what to resume from."""
        if trainer.is_global_zero:
            set_aside(newest_sound(Path(self.dirpath))[1])
        super().setup(trainer, *args, **kwargs)

    def _save_checkpoint(self, trainer, filepath):
        last = self._stopping or trainer.global_step >= trainer.max_steps
        sharded = trainer.strategy.ddp_config.use_distributed_optimizer
        sharded = sharded and get_data_parallel_world_size(with_context_parallel=True) > 1
        trainer.strategy.ckpt_optim_fully_reshardable = last or not sharded
        super()._save_checkpoint(trainer, filepath)
        self.last_saved = time.monotonic()

    def _save_last_checkpoint(self, trainer, monitor_candidates):
        super()._save_last_checkpoint(trainer, monitor_candidates)
        current = ckpt_to_dir(self.last_model_path)
        older = [path for path in saved_checkpoints(Path(self.dirpath)) if path != current][KEPT - 1 :]
        kept = [checkpoint_name(step) for step in self.keep]
        for path in trainer.strategy.broadcast([path for path in older if path.name not in kept]):
            self._remove_checkpoint(trainer, str(path))

    def _should_remove_checkpoint(self, trainer, previous, current):
        return False  # _save_last_checkpoint removes old checkpoints

    def _get_finalize_save_checkpoint_callback(self, trainer, filepath, global_step):
        finish = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)
        split = None if trainer.strategy.ckpt_optim_fully_reshardable else trainer.strategy.split

        def finish_with_context():
            if trainer.is_global_zero:
                context = ckpt_to_dir(filepath) / "context"
                shutil.copytree(Path(self.initial) / "context", context, dirs_exist_ok=True)
                write_split(ckpt_to_dir(filepath), split)
            finish()

        return finish_with_context
