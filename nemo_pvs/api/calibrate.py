"""Measuring the importance of a model's units."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_pvs.api.values import compute_of, tokens_of
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import check_new_folder
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.progress import progress

if TYPE_CHECKING:
    from nemo_pvs.calibration.scores import Scores


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path = "wikipedia-sample",
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    loader: str | None = None,
    windows: str = "packed",
    gradients: bool = False,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    device: str | None = None,
    activation_memory: str = "auto",
    ignore_manifest: bool = False,
    overwrite: bool = False,
) -> Scores:
    """Measure importance once, for every target of structured pruning.

    Args:
        source: Checkpoint folder of any format, ``.gguf`` file, ``smollm2-135m`` or ``hf://owner/name``.
        out: The folder to write the scores to.
        data: The calibration text: ``.txt``, ``.jsonl``, ``.parquet``, a folder of them, a token file (``.bin``), or
            ``wikipedia-sample``.
        samples: Number of sequences of this text.
        sequence_length: Tokens per sequence.
        seed: Seed that selects the windows of the text; -1 takes consecutive ones.
        windows: ``packed`` cuts them from all documents joined, ``documents`` each from one that is long enough.
        loader: Read the text as a reference implementation does (``data.reference_sets.LOADERS``).
        gradients: Also run the backward pass, which ``llm-pruner`` needs.
        tensor_parallel: For gradients on Megatron: ranks that share each matrix.
        pipeline_parallel: For gradients on Megatron: ranks that share the layers.
        device: ``cpu`` or ``cuda``; by default the GPU if there is one.
        activation_memory: Memory for hidden states, such as ``8GB``; ``auto`` is 8 GB on a CPU, and with a GPU what
            fits there and in page-locked memory.
        ignore_manifest: Read weights that differ from the source's manifest.
        overwrite: Replace ``out``.

    Returns:
        The scores, which ``prune`` and ``search`` take. Under torchrun every rank gets them, and the first one writes
        them.

    Raises:
        UserError: the source or the text cannot be read, ``out`` exists, or the ranks do not suit the parallelism.

    Example:
        >>> import nemo_pvs as pvs
        >>> scores = pvs.calibrate(model, folder / "scores", data=text, samples=2, sequence_length=16)
        >>> scores.tensors["ffn.energy"].shape
        torch.Size([4, 96])
    """
    out = Path(out)
    check_new_folder(out, overwrite=overwrite)
    from nemo_pvs.api.megatron_gradients import check_ranks, with_gradients
    from nemo_pvs.calibration.engine import calibrate as measure
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.system import ranks

    compute = compute_of(device, activation_memory)
    megatron = (tensor_parallel, pipeline_parallel) != (1, 1)
    if megatron and not gradients:
        raise UserError(
            "--tensor-parallel and --pipeline-parallel apply only to gradients; add --gradients, or leave them out."
        )
    with (
        ignoring_manifests(ignore_manifest),
        ranks.joined(on_gpus=megatron),
        ranks.held_by_main(locked_target(out)),
        local_checkpoint(str(source)) as folder,
    ):
        if megatron:
            check_ranks(tensor_parallel, pipeline_parallel)
        model = open_source(folder)
        tokens = tokens_of(folder, str(data), samples, sequence_length, seed, loader, windows)
        with progress("calibrate", "layers") as show:
            scores = measure(model, tokens, gradients=gradients and not megatron, compute=compute, progress=show)
        if megatron:
            scores = with_gradients(model, scores, compute, tensor_parallel, pipeline_parallel)
        if ranks.is_main():
            scores.save(out, overwrite=overwrite)
    return scores
