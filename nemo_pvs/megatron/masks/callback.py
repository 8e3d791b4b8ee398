"""The callback that holds the masks of a sparse model while it trains."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo.lightning.io import IOMixin

from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.megatron.masks.optimizer import MaskedOptimizer
from nemo_pvs.megatron.masks.rank_masks import RankMasks
from nemo_pvs.training import metrics

CHECK_STEPS = 50
"""Default number of steps between checks of the pruned weights."""


class HoldMasks(pl.Callback, IOMixin):
    """Keep the pruned weights of a sparse model at zero, and check them every few steps.

    Masks are installed after the initial weights, or those of an interrupted run, are restored. The share of zeros is
    written to the metrics.
    """

    def __init__(
        self, initial: str, path: str, clip_before_mask: bool = False, every_steps: int = CHECK_STEPS
    ) -> None:
        """Store the options.

        Args:
            initial: Checkpoint with masks in its context.
            path: Metrics file.
            clip_before_mask: Clip the norm of the dense gradient, before it is masked.
            every_steps: Steps between checks; the weights are also checked before the first step and after the last.
        """
        self.initial = initial
        self.path = Path(path)
        self.clip_before_mask = clip_before_mask
        self.every_steps = every_steps

    def on_train_start(self, trainer, pl_module):
        """Install the masks of this rank; refuse weights that are not zero where the masks prune them."""
        masks = RankMasks(
            NemoSource(self.initial),
            rank=parallel_state.get_tensor_model_parallel_rank(),
            ranks=parallel_state.get_tensor_model_parallel_world_size(),
        )
        self.masked = MaskedOptimizer(
            [optimizer.mcore_optimizer for optimizer in trainer.strategy.optimizers],
            trainer.strategy.megatron_parallel,
            masks,
            clip_before_mask=self.clip_before_mask,
        )
        self._check(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Check before the checkpoint of a step is written; Lightning runs checkpoint callbacks last."""
        if trainer.global_step % self.every_steps == 0 or trainer.global_step == trainer.max_steps:
            self._check(trainer)

    def _check(self, trainer):
        """Stop every rank if a pruned weight is not zero on any of them; record the share of zeros.

        Ranks that hold the same weights all count them, which does not change this share.

        Raises:
            RuntimeError: a pruned weight is not zero.
        """
        checks = [None] * trainer.world_size
        torch.distributed.all_gather_object(checks, self.masked.check())
        broken = sorted({name for check in checks for name in check.broken})
        if broken:
            raise RuntimeError(
                f"At step {trainer.global_step} pruned weights are not zero in {', '.join(broken[:3])}"
                f"{f' and {len(broken) - 3} more' if len(broken) > 3 else ''}; either the masks in {self.initial} do "
                "not belong to these weights, or something other than the optimizer changes weights."
            )
        if trainer.is_global_zero:
            zero_fraction = sum(check.zeros for check in checks) / sum(check.weights for check in checks)
            record = {"kind": "sparsity", "step": trainer.global_step, "zero_fraction": zero_fraction}
            metrics.append(self.path, record)
            print(f"step {trainer.global_step}/{trainer.max_steps}  zeros in masked matrices {zero_fraction:.4%}")
