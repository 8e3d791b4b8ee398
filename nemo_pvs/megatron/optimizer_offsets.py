"""Save the right part of the distributed optimizer's state for every weight.

Megatron-Core 0.15 gathers the state of all buckets of a gradient buffer without the padding at their ends, and then
looks for each weight where it is with that padding; behind a padded bucket that is the wrong place, and the checkpoint
holds other numbers, or zeros, as moments and fp32 weights (Megatron-LM pull request 5077). Tied embeddings at PP > 1
have a bucket of their own, and overlapped reduction makes more of them.
"""

from __future__ import annotations

from functools import wraps
from itertools import accumulate
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_MARK = "reads_without_padding"


def correct_saved_offsets() -> None:
    """Make every distributed optimizer of this process save so, from now on; once is enough."""
    save = DistributedOptimizer.sharded_param_state_fully_reshardable
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
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    setattr(corrected, _MARK, True)
    DistributedOptimizer.sharded_param_state_fully_reshardable = corrected


def without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Return first, end and bucket of every weight of a buffer when nothing lies between its buckets."""
    starts = accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
    gaps = [bucket.offset - start for bucket, start in zip(buffer.buckets, starts, strict=False)]
    return {
        weight: (first - gaps[bucket], end - gaps[bucket], bucket)
        for weight, (first, end, bucket) in buffer.param_index_map.items()
    }
