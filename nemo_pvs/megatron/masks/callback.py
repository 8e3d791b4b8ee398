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
"""How often weights are looked at unless the recipe says."""


class HoldMasks(pl.Callback, IOMixin):
    """Keep the pruned weights of a sparse model at zero, and look after them every few steps.

    Installed once initial weights or an interrupted run's are restored; what it finds goes into the metrics.
    """

    def __init__(
        self, initial: str, path: str, clip_before_mask: bool = False, every_steps: int = CHECK_STEPS
    ) -> None:
        """Prepare.

        Args:
            initial: Checkpoint with masks in its context.
            path: Metrics file.
            clip_before_mask: See ``MaskedOptimizer``.
            every_steps: How often the weights are looked at, besides before the first step and after the last.
        """
        self.initial = initial
        self.path = Path(path)
        self.clip_before_mask = clip_before_mask
        self.every_steps = every_steps

    def on_train_start(self, trainer, pl_module):
        """Install the masks that this rank needs; refuse weights that are not pruned as the masks say."""
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
        """Check before the checkpoint of a step is written; Lightning calls checkpoint callbacks last."""
        if trainer.global_step % self.every_steps == 0 or trainer.global_step == trainer.max_steps:
            self._check(trainer)

    def _check(self, trainer):
        """Stop every rank if a pruned weight is not zero on any; record the zeros.

        Ranks that hold the same weights count them alike, so that the share of zeros is right.
        """
        found = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, self.masked.check())
        broken = sorted({name for one in found for name in one.broken})
        if broken:
            raise RuntimeError(
                f"At step {trainer.global_step} pruned weights are not zero in {', '.join(broken[:3])}"
                f"{f' and {len(broken) - 3} more' if len(broken) > 3 else ''}; the masks in {self.initial} are not "
                "those of these weights, or something beside the optimizer changes weights."
            )
        if trainer.is_global_zero:
            zero_fraction = sum(one.zeros for one in found) / sum(one.weights for one in found)
            record = {"kind": "sparsity", "step": trainer.global_step, "zero_fraction": zero_fraction}
            metrics.append(self.path, record)
            print(f"step {trainer.global_step}/{trainer.max_steps}  zeros in masked matrices {zero_fraction:.4%}")
