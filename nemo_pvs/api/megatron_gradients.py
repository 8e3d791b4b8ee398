"""What ``calibrate`` needs to measure gradients on Megatron's ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_pvs.errors import UserError
from nemo_pvs.system.progress import progress

if TYPE_CHECKING:
    from nemo_pvs.layerwise.model import Compute


def check_ranks(tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raise UserError unless the ranks that were started hold a whole number of copies of a model."""
    from nemo_pvs.system import ranks

    parts = max(1, tensor_parallel * pipeline_parallel)
    if min(tensor_parallel, pipeline_parallel) < 1 or ranks.world_size() % parts:
        raise UserError(
            f"Tensor parallelism {tensor_parallel} and pipeline parallelism {pipeline_parallel} need a multiple of "
            f"{parts} ranks, not {ranks.world_size()}; start them with torchrun --nproc-per-node {parts}."
        )


def with_gradients(source: Any, scores: Any, compute: Compute, tensor_parallel: int, pipeline_parallel: int) -> Any:
    """Return scores with those that Megatron's gradients give on the same tokens."""
    from nemo_pvs.calibration.scores import Scores
    from nemo_pvs.system.megatron_import import import_megatron

    import_megatron()
    from nemo_pvs.megatron.gradients import megatron_taylor_scores
    from nemo_pvs.megatron.inference import megatron_ranks

    with (
        megatron_ranks(tensor_parallel, pipeline_parallel, device=compute.device),
        progress("gradients", "sequences") as show,
    ):
        more = megatron_taylor_scores(source, scores.tokens, dtype=compute.dtype, device=compute.device, progress=show)
    return Scores({**scores.tensors, **more}, scores.manifest)
