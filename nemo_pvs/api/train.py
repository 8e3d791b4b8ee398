"""Training a checkpoint on NeMo and Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_pvs.api.values import one_of, parse_pairs
from nemo_pvs.errors import UserError
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.output_paths import check_folder

if TYPE_CHECKING:
    from nemo_pvs.ledger.ledger import Ledger
    from nemo_pvs.training.job import TrainingJob
    from nemo_pvs.training.metrics import Metrics


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on disk."""

    path: Path
    """Its NeMo checkpoint."""
    job: TrainingJob
    """What was trained, and how."""
    metrics: Metrics
    """Training and validation losses, step by step."""
    ledger: Ledger
    """What the model has cost so far: its parent, pruning, this training."""


def train(
    initial: str | Path,
    out: str | Path,
    data: str | Path,
    tokens: float,
    *,
    sequence_length: int = 8192,
    global_batch_size: int = 512,
    micro_batch_size: int = 1,
    learning_rate: float = 3e-4,
    validation_samples: int = 512,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
    data_parallel: int = 1,
    precision: str = "auto",
    random_init: bool = False,
    keep_parent_embeddings: bool = False,
    initialisation: str | None = None,
    clip_before_mask: bool = False,
    seed: int = 1234,
    data_seed: int | None = None,
    first_token: float = 0,
    allow_overlap: bool = False,
    teacher: str | Path | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    rest: str = "renormalise",
    cache: str | Path | None = None,
    lm_weight: float = 0.0,
    kl_weight: float = 1.0,
    layer_pairs: str | Sequence[tuple[int, int]] | None = None,
    hidden_weight: float = 0.0,
    embedding_weight: float = 0.0,
    hidden_loss: str = "cosine",
    dynamic_weight: bool = False,
    parent_tokens: float | None = None,
    ignore_manifest: bool = False,
) -> TrainedModel:
    """Train from pruned or random weights, on text alone or with a teacher; an interrupted training is resumed.

    The ranks are separate processes, so this also works from a notebook. Masks of a sparse model are held.

    Args:
        initial: Checkpoint with the initial weights, Hugging Face or NeMo.
        out: The run folder.
        data: Folder with the token files ``train`` and ``validation`` of ``tokenize``.
        tokens: Training tokens; rounded up to whole steps.
        sequence_length: Tokens per sequence.
        global_batch_size: Sequences per optimizer step.
        micro_batch_size: Sequences per forward pass of a rank.
        learning_rate: The peak of the schedule.
        validation_samples: Sequences for validation, a multiple of the global batch size.
        tensor_parallel: Ranks that share every layer.
        pipeline_parallel: Pipeline stages that share the layers.
        first_stage_layers: Layers of the first pipeline stage, if it differs from the others.
        last_stage_layers: Layers of the last pipeline stage, if it differs from the others.
        data_parallel: Replicas that share the batch.
        precision: ``auto``, ``bf16`` or ``fp32``.
        random_init: Keep the architecture and draw the weights: the baseline.
        keep_parent_embeddings: With ``random_init``: keep embedding and norms, as the published sparse baseline does.
        initialisation: With ``random_init``: ``megatron`` (the default), ``maxtext`` or ``normal``.
        clip_before_mask: For a sparse model: clip by a norm that includes the gradients of pruned weights,
            as the published runs did.
        seed: Seed for random weights, and for the order of the data unless ``data_seed`` is given.
        data_seed: Seed for the order of the data alone.
        first_token: Where in that order to begin, such as after what the parent has read; rounded up to whole steps.
        allow_overlap: Read again what the weights were trained on, according to their ledger.
        teacher: Checkpoint to distil from, with the same tokenizer.
        temperature: Temperature of teacher and student in the divergence.
        top_k: Only the teacher's most likely tokens, this many; by default all, or all that the cache keeps.
        rest: What becomes of the other tokens' probability with ``top_k``: ``renormalise`` leaves it out, ``class``
            makes it one more class.
        cache: Folder of ``teach``, from which the teacher's answers are read.
        lm_weight: Weight of the loss against the text, in addition to the divergence.
        kl_weight: Weight of the divergence from the teacher.
        layer_pairs: Student and teacher layers whose hidden states are compared: ``[(4, 6), (8, 13)]``.
        hidden_weight: Weight of the loss of their hidden states.
        embedding_weight: Weight of the same loss after the embedding.
        hidden_loss: ``cosine`` or ``mse``.
        dynamic_weight: Scale the losses of hidden states so that together they weigh what the divergence does.
        parent_tokens: Tokens that the weights were pretrained on, if no ledger says so.
        ignore_manifest: Read weights that differ from their manifest.

    Returns:
        The trained model.

    Raises:
        UserError: a setting does not suit the model, the data or the machine, or ``out`` holds another run.
        TrainingError: a rank failed, or the training was asked to stop; it names the log.

    Example:
        >>> import nemo_pvs as pvs
        >>> manifests = pvs.tokenize(text, model, folder / "tokens", split={"train": 0.6, "validation": 0.4})
        >>> trained = pvs.train(
        ...     model, folder / "run", folder / "tokens", tokens=64, sequence_length=16, global_batch_size=2,
        ...     validation_samples=2,
        ... )
        >>> trained.ledger.training.tokens, len(trained.metrics.training)
        (64, 2)
    """
    out, data = Path(out), Path(data)
    check_folder(out)
    if keep_parent_embeddings and not random_init:
        raise UserError("--keep-parent-embeddings has an effect only with --random-init; add that, or leave it out.")
    if initialisation and not random_init:
        raise UserError("--initialisation has an effect only with --random-init; add that, or leave it out.")
    one_of("--initialisation", initialisation or "megatron", ("megatron", "maxtext", "normal"))
    if first_token < 0 or not float(first_token).is_integer():
        raise UserError(f"--first-token is {first_token:g}; give a whole number of 0 or more.")
    # Imported only now: it takes seconds, and the checks above should answer at once.
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.data.token_files import token_file_hash
    from nemo_pvs.ledger.ledger import LEDGER
    from nemo_pvs.planning.charges import ancestry, charge_run, tokens_read
    from nemo_pvs.recipe.load import parse_layout, parse_training
    from nemo_pvs.training import metrics
    from nemo_pvs.training.machine import check_here
    from nemo_pvs.training.prepare import prepare_job
    from nemo_pvs.training.trainer import Trainer

    pairs = parse_pairs(layer_pairs) if isinstance(layer_pairs, str) else layer_pairs
    distill = {
        "teacher": str(teacher) if teacher else None,
        "temperature": temperature,
        "top_k": top_k,
        "rest": rest,
        "cache": _cache_block(Path(cache)) if cache else None,
        "lm_weight": lm_weight,
        "kl_weight": kl_weight,
        "layer_pairs": pairs or (),
        "hidden_weight": hidden_weight,
        "embedding_weight": embedding_weight,
        "hidden_loss": hidden_loss,
        "dynamic_weight": dynamic_weight,
    }
    untaught = (None, 1.0, None, "renormalise", None, 0.0, 1.0, (), 0.0, 0.0, "cosine", False)
    if teacher is None and tuple(distill.values()) != untaught:
        raise UserError(
            "--temperature, --top-k, --rest, --cache, --layer-pairs, --hidden-loss and the loss weights are for "
            "distillation; add --teacher, or leave them out."
        )
    layout = parse_layout(
        {
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
            "first_stage_layers": first_stage_layers,
            "last_stage_layers": last_stage_layers,
            "data_parallel": data_parallel,
        }
    )
    training = parse_training(
        {
            "tokens": tokens,
            "sequence_length": sequence_length,
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "learning_rate": learning_rate,
            "validation_samples": validation_samples,
            "precision": precision,
            "clip_before_mask": clip_before_mask,
            "seed": seed,
            "data_seed": data_seed,
            "initialisation": initialisation or "megatron",
            "distill": distill if teacher else None,
        }
    )
    check_here(out.name, layout, training)
    # Weights that were pruned mostly come from the teacher itself, and its pretraining counts once.
    weights_from = (Path(teacher) if teacher else None) if random_init else Path(initial)
    ledger = ancestry(weights_from, parent_tokens)
    with locked_folder(out), ignoring_manifests(ignore_manifest):
        job = prepare_job(
            str(initial),
            out,
            data,
            layout,
            training,
            random_init=random_init,
            keep_parent_embeddings=keep_parent_embeddings,
            first_token=int(first_token),
            before=[] if random_init or allow_overlap else ledger.read,
            cache=Path(cache) if cache else None,
        )
        read = tokens_read(token_file_hash(data / "train"), training, job.first_token)
        with Trainer(out / "launcher.log") as trainer:
            checkpoint = trainer.train(job)
        charge_run(ledger, training, open_source(checkpoint), Path(teacher) if teacher else None, read)
        for folder in (out, checkpoint):  # next to the weights, so that what is made of them inherits their cost
            ledger.save(folder / LEDGER)
    return TrainedModel(checkpoint, job, metrics.read(job.metrics), ledger)


def _cache_block(folder: Path) -> dict[str, object]:
    """Return the recipe's block for a cache on disk."""
    from nemo_pvs.data.teacher_cache import TeacherCache

    content = TeacherCache.open(folder).content
    return {"top_k": content.top_k, "precision": content.precision}
