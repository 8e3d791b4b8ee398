"""Save and exit when the cluster asks for it, from inside NeMo's training loop; and resume from what is whole."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo import lightning as nl
from nemo.lightning.io import IOMixin
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from nemo_pvs.training.checkpoints import newest_sound, say_broken
from nemo_pvs.training.preemption import PREEMPTED, SIGNALS


class SaveOnSignal(pl.Callback, IOMixin):
    """After a SIGTERM or SIGUSR1 to any rank: finish the step, save, and exit with ``PREEMPTED``.

    NeMo's own PreemptionCallback listens to one signal on rank 0 only and exits with 0, which Slurm takes for the end
    of the job. Ranks agree by one reduction of one number a step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._handlers: dict[int, object] = {}

    def on_train_start(self, trainer, pl_module):
        """Listen from now on; before there is nothing to save, and a signal ends the process as usual."""
        self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def on_train_end(self, trainer, pl_module):
        """Stop listening."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Save and exit, all ranks at the same step."""
        asked = torch.tensor(float(self._asked), device=torch.cuda.current_device())
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if not asked.item() or trainer.global_step >= trainer.max_steps:
            return
        if trainer.is_global_zero:
            print(f"step {trainer.global_step}: asked to stop; saving, the same command goes on from here", flush=True)
        checkpoint = trainer.checkpoint_callback
        if checkpoint._last_global_step_saved != trainer.global_step:
            checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
        if isinstance(trainer.strategy.checkpoint_io, AsyncFinalizableCheckpointIO):
            trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
        torch.distributed.barrier()
        sys.exit(PREEMPTED)

    def _ask(self, number, frame):
        self._asked = True


class Resume(nl.AutoResume):
    """NeMo's AutoResume that takes the newest checkpoint that is whole, and says so when that is not the newest one.

    NeMo's takes the one whose folder changed last, and raises where only unfinished ones are there.
    """

    def setup(self, trainer, model=None):
        """Choose what to go on from, and say which newer checkpoints are of no use."""
        if os.environ.get("RANK", "0") == "0":
            for sentence in say_broken(*newest_sound(Path(self.resume_from_directory))):
                print(sentence, flush=True)
        super().setup(trainer, model)

    def _find_trainer_ckpt_path(self):
        return newest_sound(Path(self.resume_from_directory))[0]
