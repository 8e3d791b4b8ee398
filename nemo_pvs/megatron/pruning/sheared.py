"""The callback that learns masks together with the weights (Sheared LLaMA, 2310.06694), in NeMo's training loop."""

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
    """Return the callback of a run that learns masks; an empty list for other runs."""
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
            peak=job.training.peak_learning_rate,
            mask_learning_rate=how.mask_learning_rate,
            multiplier_learning_rate=how.multiplier_learning_rate,
            target_warmup_steps=int(how.target_warmup_fraction * job.training.steps + 1e-9),
            seed=how.seed,
        )
    ]


class LearnMasks(pl.Callback, IOMixin):
    """Draw gates for every step, and train the masks with the gates' gradients.

    Masks are not parameters of Megatron's model: every rank holds all of them (a few megabytes for 70 B parameters),
    draws the same noise, and takes the same step with gradients summed over all ranks. So they are fp32 even if the
    weights are bf16, have their own learning rates, and an interrupted run can resume at another TP x PP x DP. They
    take no part in the weights' optimizer, gradient norm and clipping. All micro-batches of a step use the same gates.
    Validation uses the gates that would be exported, of exactly the target shape.
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
        """Store the options.

        Args:
            initial: Checkpoint of the model to mask.
            target: Shape to reach, as ``Shape.to_dict`` returns it.
            file: File for the masks, written at the end of the run.
            path: Metrics file.
            peak: Peak learning rate of the weights; the masks' learning rate follows the same schedule.
            mask_learning_rate: Peak learning rate of the masks.
            multiplier_learning_rate: Learning rate of the Lagrange multipliers.
            target_warmup_steps: Steps over which the target sparsity rises to its final value.
            seed: Seed for the mask noise.
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
        """Create the masks, or restore those of an interrupted run, and install gates in the model.

        Raises:
            RuntimeError: the model's config has per-token losses.
        """
        if pl_module.config.calculate_per_token_loss:
            raise RuntimeError("Gates need the gradient of a mean loss; switch calculate_per_token_loss off.")
        parent, device = shape_of(NemoSource(self.initial)), torch.device(torch.cuda.current_device())
        self._masks = MaskLearner(parent, Shape.from_dict(self.target), self.settings, device)
        if self._restored:
            self._masks.load_state_dict(self._restored)
        self._sequence_parallel = pl_module.config.sequence_parallel
        for chunk in trainer.strategy.megatron_parallel:
            model = next(module for module in chunk.modules() if isinstance(module, GPTModel))
            install_gates(model, lambda: self._gates)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Draw the gates of a step; their noise depends only on the step's number."""
        self._step = trainer.global_step
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._gates = self._masks.draw(self._step).requires_grad_()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Update the masks before the checkpoint of the step is written; Lightning runs checkpoint callbacks last."""
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
                    "multipliers": {unit: pair.tolist() for unit, pair in self._masks.multipliers.items()},
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
        """Return to the dense model until the next step draws gates."""
        self._gates = None

    def state_dict(self):
        """Return the masks' state for a checkpoint; it is the same on every rank."""
        return {} if self._masks is None else deepcopy(self._masks.state_dict())

    def load_state_dict(self, state_dict):
        """Keep the state from a checkpoint until training starts."""
        self._restored = state_dict
