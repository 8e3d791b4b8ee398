"""The callback that removes units of a model while it trains, inside NeMo's training loop."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import nemo_run as run
import torch
from nemo.lightning.io import IOMixin

from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.megatron.pruning.efficient import Pruner
from nemo_pvs.megatron.pruning.gates import GatedRMSNorm
from nemo_pvs.model.layout import Layout
from nemo_pvs.pruning.learned.gates import Gates
from nemo_pvs.pruning.learned.kept_units import KeptUnits, state_file
from nemo_pvs.pruning.learned.unit_space import UnitSpace
from nemo_pvs.training import metrics
from nemo_pvs.training.job import JOB_FILE, TrainingJob


def prune_while_training(job: TrainingJob) -> list[run.Config]:
    """Return the callback of a run that prunes while training; an empty list for other runs."""
    return [run.Config(PruneWhileTraining, job=str(job.folder / JOB_FILE))] if job.pruning else []


class PruneWhileTraining(pl.Callback, IOMixin):
    """Accumulate saliency in every step, remove units when a removal is due, and hold removed units at zero.

    The kept units are saved with every checkpoint, under its step; so an interrupted run can resume in any layout.
    """

    def __init__(self, job: str) -> None:
        """Store ``job``, the path of the job file, which defines what to remove and when."""
        self.job = job

    def on_train_start(self, trainer, pl_module):
        """Hook into optimizers and norms, after the initial weights or those of an interrupted run are restored."""
        job = self._job = TrainingJob.load(Path(self.job))
        source = NemoSource(job.initial)
        space = UnitSpace(shape_of(source))
        job.pruning.check(space.shape, job.training)
        step = trainer.global_step
        state = KeptUnits.load(state_file(job.folder, step), space) if step else KeptUnits.everything(space)
        chunks = list(trainer.strategy.megatron_parallel)
        self.pruner = Pruner(
            [optimizer.mcore_optimizer for optimizer in trainer.strategy.optimizers],
            chunks,
            Layout.for_config(source.config),
            space,
            job.pruning,
            job.training,
            state,
        )
        self._current = None, None
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, GatedRMSNorm):
                    module.current = self._gates

    def _gates(self):
        """Return the gates of hidden channels; all other removed units need none, because their weights are zero."""
        kept, gates = self._current
        if kept is not self.pruner.hidden:
            kept = self.pruner.hidden
            none = torch.empty(0, device=kept.device)
            gates = None if bool(kept.all()) else Gates(kept, none, none, none)
            self._current = kept, gates
        return gates

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Tell the pruner which step begins."""
        self.pruner.begin(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Log what a step has removed; stop before the last checkpoint if the target is not reached.

        Raises:
            UserError: the training ends above the target size.
        """
        pruner, step = self.pruner, trainer.global_step
        removals = [removal for removal in pruner.state.removals if removal["step"] == step - 1]
        if removals and trainer.is_global_zero:
            shape = pruner.space.kept_shape(pruner.state.kept)
            metrics.append(self._job.metrics, {"kind": "pruning", "step": step, "parameters": shape.parameters})
            print(f"step {step}/{trainer.max_steps}  {len(removals)} removals  left: {shape}", flush=True)
        if step == trainer.max_steps and pruner.parameters > pruner.how.parameters:
            raise UserError(_not_reached(pruner, step))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        """Save the kept units before the weights of the same step."""
        if trainer.is_global_zero:
            self.pruner.state.save(state_file(self._job.folder, trainer.global_step))


def _not_reached(pruner: Pruner, steps: int) -> str:
    """Return the error message: how far pruning has come, and how many more steps it would take at the same pace."""
    whole, left, target = pruner.space.shape.parameters, pruner.parameters, int(pruner.how.parameters)
    removals = len(pruner.state.removals)
    each = max(1, (whole - left) // max(1, removals))
    more = -(-(left - target) // each)
    return (
        f"After all {steps:,} steps and {removals:,} removals the model has {left:,} parameters, not {target:,}; at "
        f"this pace it needs about {more:,} more removals, or {more * pruner.how.every:,} more steps; train on more "
        "tokens, remove more at once, or set pace: linear."
    )
