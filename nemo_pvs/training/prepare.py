"""Prepare a TrainingJob from a checkpoint and token files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.masks import check_masks, masks_of
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.data.assets import tokenizer_folder
from nemo_pvs.data.teacher_cache import CachePrecision, TeacherCache
from nemo_pvs.data.token_files import describe_token_file
from nemo_pvs.data.tokenize import tokenizer_hash
from nemo_pvs.data.windows import validation_windows, write_validation_document
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.planning.cached_teacher import disk_warning
from nemo_pvs.planning.charges import tokens_read
from nemo_pvs.planning.checks import check_context, check_training
from nemo_pvs.planning.teacher import check_pairs, check_teacher, check_teacher_context, check_tokens
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.files import read_json, sha256_json, write_json
from nemo_pvs.system.progress import console, progress, warn
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.teaching_job import TeachingJob, content_for

_SPARSE = 0.1
"""Share of zeros in a matrix above which they are unlikely to be chance."""


def prepare_job(
    initial: str,
    out: Path,
    data: Path,
    layout: Parallelism,
    training: Training,
    *,
    random_init: bool,
    keep_parent_embeddings: bool = False,
    first_token: int = 0,
    before: Sequence[TokensRead] = (),
    cache: Path | None = None,
) -> TrainingJob:
    """Write initial weights and validation windows into ``out``, unless an earlier call did, and return the job.

    Random weights of a sparse model are zero where its masks prune them, and training holds these masks too.

    Args:
        initial: Checkpoint with the initial weights; with ``random_init`` only its architecture and masks are used.
        out: Run folder.
        data: Folder with the token files ``train`` and ``validation``.
        layout: Parallelism of the run.
        training: Options of the training.
        random_init: Draw random weights.
        keep_parent_embeddings: With ``random_init``, keep the embeddings and norms of ``initial``, as the published
            baseline does.
        first_token: First token to read, counted in training order; rounded up to whole steps.
        before: Token ranges that the initial weights were trained on, and must not be trained on again.
        cache: Folder of a cache with the answers of the teacher of ``training.distill``.

    Raises:
        UserError: the layout does not fit the model or the batch, sequences are longer than the model's context,
            ``clip_before_mask`` is set for a model without masks, masks do not belong to the model, the data are too
            short, were made with another tokenizer or were read before, the teacher of ``training.distill`` cannot
            teach this model, the cache does not have its answers to these tokens, or ``out`` holds another run.
    """
    source: WeightSource = open_source(initial)
    shape = shape_of(source)
    check_training(training, layout, shape)
    context = int(source.config.get("max_position_embeddings", 0))
    check_context(training.sequence_length, context, "--sequence-length")
    if training.clip_before_mask and not masks_of(source).names:
        raise UserError(f"{initial} has no masks, so --clip-before-mask has no effect; leave it out.")
    teacher = Path(training.distill.teacher) if training.distill else None
    if teacher and training.distill:
        check_teacher(shape_of(open_source(teacher)), shape, layout, cached=cache is not None)
        check_pairs(training.distill, shape_of(open_source(teacher)), shape)
        check_teacher_context(str(teacher), training.sequence_length, "--sequence-length")
        check_tokens(teacher, Path(initial))
    tokenizer = tokenizer_hash(tokenizer_folder(Path(initial)))
    train_file = describe_token_file(data / "train", tokenizer, shape.vocab)
    describe_token_file(data / "validation", tokenizer, shape.vocab)
    read = tokens_read(train_file["bin_sha256"], training, _whole_steps(first_token, training))
    _check_enough(read, training, train_file["tokens"], data)
    read.check_new(before)
    if cache and teacher and training.distill:
        needed = content_for(
            training,
            read.first,
            read.end,
            teacher=fingerprint(open_source(teacher)),
            tokenizer=tokenizer,
            data=train_file["bin_sha256"],
            vocab=shape.vocab,
            top_k=training.distill.kept or 1,
        )
        TeacherCache.open(cache).check_serves(needed)
    windows = validation_windows(
        data / "validation", samples=training.validation_samples, sequence_length=training.sequence_length
    )
    name = fingerprint(source)
    if random_init:
        keep = source if keep_parent_embeddings else None
        masks = masks_of(source)
        scheme = training.initialisation
        source = RandomSource(source.config, training.seed, source.assets, torch.bfloat16, masks, keep, scheme)
        # Hash what determines the random weights: drawing a large model only to hash it takes minutes.
        initialisation = {"initialisation": scheme} if scheme != "megatron" else {}
        digest = sha256_json({"random": training.seed, "model": name, **initialisation})
        name = digest[: len(name)]
    settings = {
        "initial": name,
        "training": training.model_dump(mode="json"),
        "data": train_file["bin_sha256"],
        "validation": windows.manifest["ids_sha256"],
        **({"teacher": fingerprint(open_source(teacher))} if teacher else {}),
        **({"first_token": read.first} if read.first else {}),
    }
    settings_file = out / "settings.json"
    begun = read_json(settings_file) if settings_file.exists() else None
    if begun and begun["data"] != train_file["bin_sha256"]:
        raise UserError(f"{out} holds a run on another {data / 'train'}.bin; choose another folder or remove it.")
    if begun and begun != settings:
        raise UserError(f"{out} holds a run with other settings or weights; choose another folder or remove it.")
    if begun is None:
        check_masks(source)
        _say_unmasked_zeros(initial, source)
        with progress("write initial weights", "parameters") as show:
            write_nemo(source, out / "initial", overwrite=True, progress=show)
        write_validation_document(windows, out / "validation_windows", shape.vocab)
        write_json(settings_file, settings)
    folder = out.resolve()
    job = TrainingJob(
        name=out.name,
        folder=folder,
        initial=folder / "initial",
        data={"train": str((data / "train").resolve()), "validation": str(folder / "validation_windows")},
        layout=layout,
        training=training,
        first_token=read.first,
        teacher=teacher.resolve() if teacher else None,
        cache=cache.resolve() if cache else None,
    )
    job.build_index()
    return job


def prepare_teaching(
    teacher: Path,
    out: Path,
    data: Path,
    layout: Parallelism,
    training: Training,
    *,
    top_k: int,
    precision: CachePrecision,
    first_token: int = 0,
) -> TeachingJob:
    """Begin a cache in ``out``, unless an earlier call did, and return the job that completes it.

    Args:
        teacher: Checkpoint of the teacher.
        out: Folder of the cache.
        data: Folder with the token file ``train``.
        layout: TP, PP and DP of the teacher.
        training: Options of a training that the cache is for.
        top_k: Number of tokens for each position; of a small vocabulary all.
        precision: Type of the log-probabilities.
        first_token: First token to answer, counted in training order; rounded up to whole steps.

    Raises:
        UserError: the layout does not fit the teacher, sequences are longer than its context, the data are too short
            or were made with another tokenizer, or ``out`` holds another cache (``TeachingJob.save``).
    """
    source: WeightSource = open_source(teacher)
    shape = shape_of(source)
    shape.check_parallel(tensor_parallel=layout.tensor_parallel, pipeline_parallel=layout.pipeline_parallel)
    check_teacher_context(str(teacher), training.sequence_length, "--sequence-length")
    tokenizer = tokenizer_hash(tokenizer_folder(teacher))
    train_file = describe_token_file(data / "train", tokenizer, shape.vocab)
    read = tokens_read(train_file["bin_sha256"], training, _whole_steps(first_token, training))
    _check_enough(read, training, train_file["tokens"], data)
    content = content_for(
        training,
        read.first,
        read.end,
        teacher=fingerprint(source),
        tokenizer=tokenizer,
        data=train_file["bin_sha256"],
        vocab=shape.vocab,
        top_k=top_k,
        precision=precision,
    )
    job = TeachingJob(
        name=f"teach {out.name}",
        folder=out.resolve(),
        teacher=teacher.resolve(),
        text=str((data / "train").resolve()),
        index=out.resolve() / "index",
        content=content,
        layout=layout,
        micro_batch_size=training.micro_batch_size,
        precision=training.precision,
    )
    job.save()
    needed = content.bytes_per_token * (content.tokens - job.cache.tokens_done)
    if warning := disk_warning(needed, out):
        console.print(warning, soft_wrap=True)
    job.build_index()
    return job


def _check_enough(read: TokensRead, training: Training, available: int, data: Path) -> None:
    """Refuse to read past the end of the training text; one more token is needed, the label of the last one.

    Raises:
        UserError: saying how many tokens there are.
    """
    if read.end >= available:
        start = f" from token {read.first:,} on" if read.first else ""
        raise UserError(
            f"The run reads {int(training.tokens):,} tokens{start}, but {data / 'train'}.bin has {available:,}; "
            "tokenise more text or train on fewer tokens."
        )


def _whole_steps(first_token: int, training: Training) -> int:
    """Round a token position up to whole steps, as recipes do with their ranges."""
    return -(-first_token // training.tokens_per_step) * training.tokens_per_step


def _say_unmasked_zeros(initial: str, source: WeightSource) -> None:
    """Warn if a model looks sparse but has no masks, as when another tool pruned it: training fills its zeros."""
    first = next(matrix_sparsity(source))
    share = first.zeros / first.weights
    if not masks_of(source).names and share > _SPARSE:
        how = f"--method magnitude --sparsity {first.pattern or f'{share:.4g}'}"
        warn(
            f"{initial} has {share:.0%} zeros in {first.name} and no masks, so training fills them; "
            f"pvs prune {initial} DST {how} keeps these zeros and writes their masks."
        )
