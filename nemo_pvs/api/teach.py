"""Computing a teacher's answers once, for all trainings that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_pvs.api.values import one_of
from nemo_pvs.errors import UserError
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.output_paths import check_folder

if TYPE_CHECKING:
    from nemo_pvs.data.teacher_cache import TeacherCache


def teach(
    teacher: str | Path,
    out: str | Path,
    data: str | Path,
    tokens: float,
    *,
    top_k: int = 32,
    cache_precision: str = "fp16",
    sequence_length: int = 8192,
    global_batch_size: int = 512,
    micro_batch_size: int = 1,
    data_seed: int = 1234,
    first_token: float = 0,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    data_parallel: int = 1,
    precision: str = "auto",
    ignore_manifest: bool = False,
) -> TeacherCache:
    """Write a teacher's most likely tokens and their log-probabilities to disk; an interrupted call is resumed.

    With the same data, tokens, sequence length, batch size and seed as ``train``, the cache has what ``train`` reads.
    Neither the number of ranks nor how they share the models matters, here or in ``train``.

    Args:
        teacher: Checkpoint of the teacher, of any format.
        out: The folder of the cache.
        data: Folder with the token file ``train`` of ``tokenize``.
        tokens: Tokens to answer; rounded up to whole steps of training.
        top_k: Number of tokens whose log-probabilities are kept for each position.
        cache_precision: ``fp16``, or ``fp32`` for log-probabilities that are not rounded.
        sequence_length: Tokens per sequence.
        global_batch_size: Sequences per optimizer step of the training.
        micro_batch_size: Sequences per forward pass of a rank.
        data_seed: Seed of the order of the data: ``data_seed`` of ``train``, or its ``seed`` if it has none.
        first_token: Where in that order to begin; rounded up to whole steps.
        tensor_parallel: Ranks that share every layer.
        pipeline_parallel: Pipeline stages that share the layers.
        data_parallel: Replicas that share the samples.
        precision: Arithmetic of the teacher: ``auto``, ``bf16`` or ``fp32``.
        ignore_manifest: Read weights that differ from their manifest.

    Returns:
        The cache, whose ``content`` describes it.

    Raises:
        UserError: a setting does not suit the teacher, the data or the machine, or ``out`` holds another cache.
        TrainingError: a rank failed, or was asked to stop; it names the log.

    Example:
        >>> import nemo_pvs as pvs
        >>> manifests = pvs.tokenize(text, model, folder / "tokens", split={"train": 0.6, "validation": 0.4})
        >>> cache = pvs.teach(
        ...     model, folder / "cache", folder / "tokens", tokens=64, top_k=8, sequence_length=16, global_batch_size=2
        ... )
        >>> cache.content.tokens, cache.read(0).ids.shape
        (64, (16, 8))
    """
    out, data, teacher = Path(out), Path(data), Path(teacher)
    check_folder(out)
    one_of("--cache-precision", cache_precision, ("fp16", "fp32"))
    if top_k < 1:
        raise UserError(f"--top-k is {top_k}; give a number of 1 or more.")
    if first_token < 0 or not float(first_token).is_integer():
        raise UserError(f"--first-token is {first_token:g}; give a whole number of 0 or more.")
    # Imported only now: it takes seconds, and the checks above should answer at once.
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.data.teacher_cache import TeacherCache
    from nemo_pvs.ledger.ledger import LEDGER, Ledger
    from nemo_pvs.recipe.load import parse_layout, parse_training
    from nemo_pvs.training.machine import check_here
    from nemo_pvs.training.prepare import prepare_teaching
    from nemo_pvs.training.trainer import Trainer

    parallel = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    layout = parse_layout({**parallel, "data_parallel": data_parallel})
    training = parse_training(
        {
            "tokens": tokens,
            "sequence_length": sequence_length,
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "validation_samples": global_batch_size,  # this and the rate are not used
            "learning_rate": 1.0,
            "precision": precision,
            "data_seed": data_seed,
        }
    )
    check_here(out.name, layout, training)
    with locked_folder(out), ignoring_manifests(ignore_manifest):
        job = prepare_teaching(
            teacher,
            out,
            data,
            layout,
            training,
            top_k=top_k,
            precision="fp32" if cache_precision == "fp32" else "fp16",
            first_token=int(first_token),
        )
        with Trainer(out / "launcher.log") as trainer:
            trainer.train(job)
        ledger, shape = Ledger(), shape_of(open_source(teacher))
        ledger.charge("teacher", job.content.tokens, shape, sequence_length, training=False, note="forward, once")
        ledger.save(out / LEDGER)
    return TeacherCache.open(out)
