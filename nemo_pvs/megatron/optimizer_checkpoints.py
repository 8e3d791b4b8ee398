"""Save and restore the right part of the distributed optimizer's state for every weight.

Megatron-Core 0.15 gathers the state of all buckets of a gradient buffer without the padding at their ends, but then
looks up each weight at its offset with that padding. After a padded bucket this offset is wrong, and the checkpoint
gets other weights' numbers, or zeros, as moments and fp32 weights (Megatron-LM pull request 5077). Tied embeddings at
PP > 1 have their own bucket, and overlapped reduction creates more buckets.

In fp32 the optimizer's shards are views of the weights themselves. Megatron restores them in place, which PyTorch
allows only where no gradient is recorded.
"""

from __future__ import annotations

from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_MARK = "corrected"


def correct_optimizer_checkpoints() -> None:
    """Make every distributed optimizer of this process save and restore its state correctly, from now on."""
    save = DistributedOptimizer.sharded_param_state_fully_reshardable
    restore = DistributedOptimizer._set_main_param_and_optimizer_states
    if hasattr(save, _MARK):
        return

    @wraps(save)
    def corrected(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = without_padding(buffer)
            return save(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map

    setattr(corrected, _MARK, True)
    DistributedOptimizer.sharded_param_state_fully_reshardable = corrected
    DistributedOptimizer._set_main_param_and_optimizer_states = torch.no_grad()(restore)


def without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Return (start, end, bucket) of every weight of a buffer, counted without the padding between its buckets."""
    starts = accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
    gaps = [bucket.offset - start for bucket, start in zip(buffer.buckets, starts, strict=False)]
    return {
        weight: (first - gaps[bucket], end - gaps[bucket], bucket)
        for weight, (first, end, bucket) in buffer.param_index_map.items()
    }
