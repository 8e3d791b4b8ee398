"""Save by the clock, or on a signal from the cluster and exit; resume from the newest intact checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo import lightning as nl
from nemo.lightning.io import IOMixin
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from nemo_pvs.training.checkpoints import newest_sound, say_broken
from nemo_pvs.training.preemption import PREEMPTED, SIGNALS

_SAVE, _STOP = 1.0, 2.0
_SECONDS_BETWEEN_LOOKS = 0.5


class SaveOnTimeOrSignal(pl.Callback, IOMixin):
    """Save by the clock; save and exit with ``PREEMPTED`` after a SIGTERM or SIGUSR1 to any rank.

    Lightning can save by time or by steps, but not by both. NeMo's own PreemptionCallback listens for one signal on
    rank 0 only and exits with 0, which tells Slurm that the job is done. Ranks agree, by rank 0's clock, through an
    all-reduce of one number per step.
    """

    def __init__(self, minutes: float) -> None:
        """Take the time from one checkpoint to the next."""
        self.minutes = minutes
        self._requested = False
        self._handlers: dict[int, object] = {}

    def on_train_start(self, trainer, pl_module):
        """Install signal handlers; before this there is nothing to save, and a signal ends the process as usual."""
        self._handlers = {number: signal.signal(number, self._request) for number in SIGNALS}

    def teardown(self, trainer, pl_module, stage):
        """Restore the previous signal handlers, now that the last save is finished, which goes on after training."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Save, and exit if any rank was signalled, all ranks at the same step."""
        checkpoint = trainer.checkpoint_callback
        due = checkpoint is not None and time.monotonic() - checkpoint.last_saved >= 60 * self.minutes
        due = due and trainer.is_global_zero  # the other ranks learn it from rank 0
        wish = _STOP if self._requested else _SAVE if due else 0.0
        wishes = torch.tensor(wish, device=torch.cuda.current_device())
        torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX)
        wish = wishes.item()
        if not wish or trainer.global_step >= trainer.max_steps:
            return
        if wish == _SAVE:
            checkpoint.save(trainer)
            return
        if trainer.is_global_zero:
            print(
                f"step {trainer.global_step}: stop requested: saving; the same command resumes from here", flush=True
            )
        checkpoint.save(trainer, stopping=True)
        finish_saving(trainer)
        torch.distributed.barrier()
        sys.exit(PREEMPTED)

    def _request(self, number, frame):
        self._requested = True


def finish_saving(trainer: pl.Trainer) -> None:
    """Wait, on all ranks, until an asynchronous save is finished.

    To wait by ``blocking`` is one collective, in which ranks that have written wait for those that still write; NCCL
    ends a job that waits for ten minutes. Each collective of this loop is short.
    """
    checkpoint_io = trainer.strategy.checkpoint_io
    if isinstance(checkpoint_io, AsyncFinalizableCheckpointIO):
        while checkpoint_io.async_calls_queue.get_num_unfinalized_calls():
            if not checkpoint_io.maybe_finalize_save_checkpoint(blocking=False):
                time.sleep(_SECONDS_BETWEEN_LOOKS)


class Resume(nl.AutoResume):
    """NeMo's AutoResume, but from the newest intact checkpoint; prints a message about newer ones that are broken.

    NeMo's own takes the one whose folder changed last, and raises an error if all of them are unfinished.
    """

    def setup(self, trainer, model=None):
        """Choose the checkpoint to resume from, and print which newer ones are broken."""
        if os.environ.get("RANK", "0") == "0":
            for sentence in say_broken(*newest_sound(Path(self.resume_from_directory))):
                print(sentence, flush=True)
        super().setup(trainer, model)

    def _find_trainer_ckpt_path(self):
        return newest_sound(Path(self.resume_from_directory))[0]
