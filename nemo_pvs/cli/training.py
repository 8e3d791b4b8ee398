"""The verbs about tokens and training: tokenizer, tokenize, teach, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_pvs.cli.arguments import PARALLEL, TRAINING, IgnoreManifest, ParentTokens
from nemo_pvs.system.progress import console

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

DATA, WEIGHTS, DISTILLATION = "Data", "Initial weights", "Distillation"
"""Panels of --help."""


def tokenizer(
    inputs: Annotated[list[str], typer.Argument(help="text files or folders, or wikipedia-sample")],
    vocab: Annotated[int, typer.Option(help="size of the vocabulary, with the 256 bytes")],
    out: Annotated[str, typer.Option(help="Hugging Face folder to write")],
    text_key: Annotated[str, typer.Option(help="key or column that holds the text")] = "text",
) -> None:
    """Train a byte-level BPE tokenizer on text, for a parent that is trained from scratch."""
    from nemo_pvs.api.train_tokenizer import train_tokenizer

    made = train_tokenizer(inputs, out, vocab=vocab, text_key=text_key)
    console.print(f"tokenizer with {vocab:,} tokens: {made}", soft_wrap=True)


def tokenize(
    inputs: Annotated[list[str], typer.Argument(help="text files or folders, or wikipedia-sample")],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face folder whose tokenizer to use")],
    out: Annotated[str, typer.Option(help="folder for <split>.bin and <split>.idx")],
    split: Annotated[
        str, typer.Option(help="share of the documents of each split; they add up to 1")
    ] = "train=0.9,validation=0.1",
    text_key: Annotated[str, typer.Option(help="key or column that holds the text")] = "text",
    seed: Annotated[int, typer.Option(help="seed of the split")] = 0,
    workers: Annotated[
        Optional[int], typer.Option(help="processes that share the text; one per core unless set")
    ] = None,
    shard: Annotated[
        Optional[str],
        typer.Option(help="tokenise only a share of the text, e.g. 3/16; when all are done, run once without --shard"),
    ] = None,
) -> None:
    """Turn text into Megatron token files, split by document; an interrupted run is resumed."""
    from nemo_pvs.api.tokenize import tokenize as write

    made = write(inputs, tokenizer, out, split=split, text_key=text_key, seed=seed, workers=workers, shard=shard)
    if shard and not made:
        console.print(
            f"shard {shard} is tokenised; the same command without --shard joins all shards.", soft_wrap=True
        )
    for name, manifest in made.items():
        about = f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens"
        console.print(f"{Path(out) / name}.bin: {about}", soft_wrap=True)


def teach(
    teacher: Annotated[str, typer.Argument(help="checkpoint of the teacher, of any format")],
    out: Annotated[str, typer.Option(help="folder of the cache; an interrupted one in it is completed")],
    data: Annotated[str, typer.Option(help="folder with train.bin from pvs tokenize", rich_help_panel=DATA)],
    tokens: Annotated[
        float, typer.Option(help="tokens to answer, rounded up to whole steps, e.g. 50e9", rich_help_panel=DATA)
    ],
    top_k: Annotated[int, typer.Option(help="tokens whose log-probabilities are kept for each position")] = 32,
    cache_precision: Annotated[
        str, typer.Option(help="fp16, or fp32 for log-probabilities that are not rounded")
    ] = "fp16",
    sequence_length: Annotated[int, typer.Option(help="tokens per sequence", rich_help_panel=DATA)] = 8192,
    global_batch_size: Annotated[
        int, typer.Option(help="sequences per optimizer step of the training", rich_help_panel=DATA)
    ] = 512,
    micro_batch_size: Annotated[
        int, typer.Option(help="sequences per forward pass of a rank", rich_help_panel=PARALLEL)
    ] = 1,
    data_seed: Annotated[
        int,
        typer.Option(help="for the order of the data: --data-seed or else --seed of pvs train", rich_help_panel=DATA),
    ] = 1234,
    first_token: Annotated[
        float, typer.Option(help="where in that order to begin; rounded up to whole steps", rich_help_panel=DATA)
    ] = 0,
    tensor_parallel: Annotated[int, typer.Option(help="ranks that share every layer", rich_help_panel=PARALLEL)] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(help="pipeline stages that share the layers", rich_help_panel=PARALLEL)
    ] = 1,
    data_parallel: Annotated[int, typer.Option(help="replicas that share the samples", rich_help_panel=PARALLEL)] = 1,
    precision: Annotated[
        str, typer.Option(help="arithmetic of the teacher: auto, bf16 or fp32", rich_help_panel=PARALLEL)
    ] = "auto",
    ignore_manifest: IgnoreManifest = False,
) -> None:
    """Write a teacher's most likely tokens to disk, once for all trainings that distil from it."""
    from nemo_pvs.api.teach import teach as write

    made = write(
        teacher,
        out,
        data,
        tokens,
        top_k=top_k,
        cache_precision=cache_precision,
        sequence_length=sequence_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_seed=data_seed,
        first_token=first_token,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        data_parallel=data_parallel,
        precision=precision,
        ignore_manifest=ignore_manifest,
    )
    content = made.content
    console.print(
        f"teacher cache: {made.folder}, {content.tokens:,} tokens, {content.bytes_per_token:,.0f} bytes each, from "
        f"token {content.first * content.sequence_length:,} of the training order; the {content.top_k} most likely "
        f"tokens hold {made.kept_probability():.1%} of the teacher's probability",
        soft_wrap=True,
    )


def train(
    initial: Annotated[str, typer.Argument(help="checkpoint folder with the initial weights, of any format")],
    out: Annotated[str, typer.Argument(help="run folder; an interrupted run in it is resumed")],
    data: Annotated[
        str, typer.Option(help="folder with train.bin and validation.bin from pvs tokenize", rich_help_panel=DATA)
    ],
    tokens: Annotated[float, typer.Option(help="training tokens, e.g. 50e9", rich_help_panel=TRAINING)],
    sequence_length: Annotated[int, typer.Option(help="tokens per sequence", rich_help_panel=TRAINING)] = 8192,
    global_batch_size: Annotated[
        int, typer.Option(help="sequences per optimizer step", rich_help_panel=TRAINING)
    ] = 512,
    micro_batch_size: Annotated[
        int, typer.Option(help="sequences per forward pass of a rank", rich_help_panel=TRAINING)
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="peak", rich_help_panel=TRAINING)] = 3e-4,
    validation_samples: Annotated[
        int, typer.Option(help="sequences for validation, a multiple of the global batch size", rich_help_panel=DATA)
    ] = 512,
    tensor_parallel: Annotated[int, typer.Option(help="ranks that share every layer", rich_help_panel=PARALLEL)] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(help="pipeline stages that share the layers", rich_help_panel=PARALLEL)
    ] = 1,
    first_stage_layers: Annotated[
        Optional[int],
        typer.Option(help="layers of the first pipeline stage, if it is not like the rest", rich_help_panel=PARALLEL),
    ] = None,
    last_stage_layers: Annotated[
        Optional[int],
        typer.Option(help="layers of the last pipeline stage, if it is not like the rest", rich_help_panel=PARALLEL),
    ] = None,
    data_parallel: Annotated[int, typer.Option(help="replicas that share the batch", rich_help_panel=PARALLEL)] = 1,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32", rich_help_panel=TRAINING)] = "auto",
    random_init: Annotated[
        bool, typer.Option(help="keep the architecture, draw the weights: the baseline", rich_help_panel=WEIGHTS)
    ] = False,
    keep_parent_embeddings: Annotated[
        bool,
        typer.Option(
            help="with --random-init: keep embedding and norms, as the published sparse baseline does",
            rich_help_panel=WEIGHTS,
        ),
    ] = False,
    initialisation: Annotated[
        Optional[str],
        typer.Option(
            help="with --random-init: megatron (default), maxtext or normal (recipes/README.md)",
            rich_help_panel=WEIGHTS,
        ),
    ] = None,
    clip_before_mask: Annotated[
        bool,
        typer.Option(
            help="for a sparse model: clip by a norm that includes pruned weights, as the published runs did",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="for random weights, and for the order of the data unless --data-seed is given",
            rich_help_panel=TRAINING,
        ),
    ] = 1234,
    data_seed: Annotated[
        Optional[int], typer.Option(help="for the order of the data alone", rich_help_panel=DATA)
    ] = None,
    first_token: Annotated[
        float,
        typer.Option(
            help="where in that order to begin, e.g. after what the parent read; rounded up to whole steps",
            rich_help_panel=DATA,
        ),
    ] = 0,
    allow_overlap: Annotated[
        bool,
        typer.Option(
            help="read again what the weights were trained on, according to their ledger", rich_help_panel=DATA
        ),
    ] = False,
    teacher: Annotated[
        Optional[str],
        typer.Option(help="checkpoint to distil from, with the same tokenizer", rich_help_panel=DISTILLATION),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="of teacher and student in the divergence", rich_help_panel=DISTILLATION)
    ] = 1.0,
    top_k: Annotated[
        Optional[int],
        typer.Option(help="only this many of the teacher's most likely tokens", rich_help_panel=DISTILLATION),
    ] = None,
    rest: Annotated[
        str,
        typer.Option(
            help="with --top-k: renormalise, or class, which makes the other tokens one more class",
            rich_help_panel=DISTILLATION,
        ),
    ] = "renormalise",
    cache: Annotated[
        Optional[str],
        typer.Option(help="folder of pvs teach with the teacher's answers", rich_help_panel=DISTILLATION),
    ] = None,
    lm_weight: Annotated[
        float,
        typer.Option(
            help="weight of the loss against the text, in addition to the divergence", rich_help_panel=DISTILLATION
        ),
    ] = 0.0,
    kl_weight: Annotated[
        float, typer.Option(help="weight of the divergence from the teacher", rich_help_panel=DISTILLATION)
    ] = 1.0,
    layer_pairs: Annotated[
        Optional[str],
        typer.Option(
            help="student:teacher layers whose hidden states are compared, e.g. 4:6,8:13",
            rich_help_panel=DISTILLATION,
        ),
    ] = None,
    hidden_weight: Annotated[
        float, typer.Option(help="weight of the loss of their hidden states", rich_help_panel=DISTILLATION)
    ] = 0.0,
    embedding_weight: Annotated[
        float, typer.Option(help="weight of the same loss after the embedding", rich_help_panel=DISTILLATION)
    ] = 0.0,
    hidden_loss: Annotated[str, typer.Option(help="cosine or mse", rich_help_panel=DISTILLATION)] = "cosine",
    dynamic_weight: Annotated[
        bool,
        typer.Option(
            help="scale the losses of hidden states so that together they weigh what the divergence does",
            rich_help_panel=DISTILLATION,
        ),
    ] = False,
    parent_tokens: ParentTokens = None,
    ignore_manifest: IgnoreManifest = False,
) -> None:
    """Train on NeMo and Megatron, from pruned or random weights, on text alone or with a teacher."""
    from nemo_pvs.api.train import train as train_checkpoint

    trained = train_checkpoint(
        initial,
        out,
        data,
        tokens,
        sequence_length=sequence_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        validation_samples=validation_samples,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        first_stage_layers=first_stage_layers,
        last_stage_layers=last_stage_layers,
        data_parallel=data_parallel,
        precision=precision,
        random_init=random_init,
        keep_parent_embeddings=keep_parent_embeddings,
        initialisation=initialisation,
        clip_before_mask=clip_before_mask,
        seed=seed,
        data_seed=data_seed,
        first_token=first_token,
        allow_overlap=allow_overlap,
        teacher=teacher,
        temperature=temperature,
        top_k=top_k,
        rest=rest,
        cache=cache,
        lm_weight=lm_weight,
        kl_weight=kl_weight,
        layer_pairs=layer_pairs,
        hidden_weight=hidden_weight,
        embedding_weight=embedding_weight,
        hidden_loss=hidden_loss,
        dynamic_weight=dynamic_weight,
        parent_tokens=parent_tokens,
        ignore_manifest=ignore_manifest,
    )
    console.print(f"trained checkpoint: {trained.path}", soft_wrap=True)
