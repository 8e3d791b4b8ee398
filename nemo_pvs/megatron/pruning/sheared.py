"""The callback that learns masks together with the weights, inside NeMo's training loop."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import lightning.pytorch as pl
import nemo_run as run
import torch
from megatron.core.models.gpt import GPTModel
from nemo.lightning.io import IOMixin

from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.megatron.pruning.gates import gate_gradients, install_gates
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.learned.gates import Gates
from nemo_pvs.pruning.learned.mask_learning import MaskLearner, MaskSettings
from nemo_pvs.pruning.learned.sheared import save_masks
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob


def learn_masks(job: TrainingJob) -> list[run.Config]:
    """Return the callback of a run that learns masks; none for any other."""
    if job.masks is None:
        return []
    how = job.masks.how
    return [
        run.Config(
            LearnMasks,
            initial=str(job.initial),
            target=job.masks.target.to_dict(),
            file=str(job.masks_file),
            path=str(job.metrics),
            peak=job.training.learning_rate,
            mask_learning_rate=how.mask_learning_rate,
            multiplier_learning_rate=how.multiplier_learning_rate,
            target_warmup_steps=int(how.target_warmup_fraction * job.training.steps + 1e-9),
            seed=how.seed,
        )
    ]


class LearnMasks(pl.Callback, IOMixin):
    """Run every step with gates drawn for it, and teach the masks by the gates' gradients.

    Masks are no parameters of Megatron's model: every rank holds all of them (some megabytes for 70 B parameters),
    draws the same noise, and takes the same step by gradients that are summed over all ranks. So they are fp32 beside
    bf16 weights, have learning rates of their own, and an interrupted run goes on at another TP x PP x DP. The
    optimizer of the weights, its gradient norm and its clipping know nothing of them. All micro-batches of a step
    have the same gates. Validation has the gates that would be exported, of exactly the target shape.
    """

    def __init__(
        self,
        initial: str,
        target: dict,
        file: str,
        path: str,
        peak: float,
        mask_learning_rate: float = 1.0,
        multiplier_learning_rate: float = 1.0,
        target_warmup_steps: int = 640,
        seed: int = 0,
    ) -> None:
        """Prepare.

        Args:
            initial: Checkpoint of the model that is masked.
            target: Its shape afterwards, as ``Shape.to_dict``.
            file: Where the masks go when the run has ended.
            path: Metrics file.
            peak: Learning rate of the weights at the peak of the schedule that masks follow too.
            mask_learning_rate: See ``MaskSettings``.
            multiplier_learning_rate: See there.
            target_warmup_steps: See there.
            seed: See there.
        """
        self.initial = initial
        self.target = target
        self.file = Path(file)
        self.path = Path(path)
        self.peak = peak
        self.settings = MaskSettings(mask_learning_rate, multiplier_learning_rate, target_warmup_steps, seed)
        self._restored: dict | None = None
        self._masks: MaskLearner | None = None
        self._gates: Gates | None = None
        self._rate = 0.0

    def on_train_start(self, trainer, pl_module):
        """Make the masks, or those of the interrupted run, and let gates act on the model."""
        if pl_module.config.calculate_per_token_loss:
            raise RuntimeError("Gradients of gates are those of a mean loss; switch calculate_per_token_loss off.")
        parent, device = shape_of(NemoSource(self.initial)), torch.device(torch.cuda.current_device())
        self._masks = MaskLearner(parent, Shape.from_dict(self.target), self.settings, device)
        if self._restored:
            self._masks.load_state_dict(self._restored)
        self._sequence_parallel = pl_module.config.sequence_parallel
        for chunk in trainer.strategy.megatron_parallel:
            model = next(module for module in chunk.modules() if isinstance(module, GPTModel))
            install_gates(model, lambda: self._gates)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Draw the gates of a step; they depend on its number alone."""
        self._step = trainer.global_step
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._gates = self._masks.draw(self._step).requires_grad_()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Take the masks' own step, before the checkpoint of the step is written; Lightning calls that last."""
        gradients = gate_gradients(self._gates, sequence_parallel=self._sequence_parallel)
        self._masks.learn(self._step, gradients, self._rate / self.peak)
        self._gates = None
        if trainer.is_global_zero:
            sparsities = self._masks.sparsities()
            metrics.append(
                self.path,
                {
                    "kind": "masks",
                    "step": trainer.global_step,
                    "sparsities": sparsities,
                    "targets": self._masks.targets,
                    "multipliers": {unit: one.tolist() for unit, one in self._masks.multipliers.items()},
                },
            )
            closed = ", ".join(f"{unit} {share:.2%}" for unit, share in sparsities.items())
            print(f"step {trainer.global_step}/{trainer.max_steps}  masks closed: {closed}", flush=True)
        if trainer.global_step == trainer.max_steps and trainer.is_global_zero:
            save_masks(self.file, self._masks)

    def on_validation_start(self, trainer, pl_module):
        """Validate the model that would be exported now."""
        if self._masks is not None:
            self._gates = self._masks.deterministic()

    def on_validation_end(self, trainer, pl_module):
        """Go back to drawn gates."""
        self._gates = None

    def state_dict(self):
        """Return what goes into every checkpoint; it is the same on every rank."""
        return {} if self._masks is None else deepcopy(self._masks.state_dict())

    def load_state_dict(self, state_dict):
        """Keep what a checkpoint held until training starts."""
        self._restored = state_dict
