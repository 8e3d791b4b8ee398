"""The verbs about tokens and training: tokenize, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_pvs.api.values import one_of, parse_pairs, parse_shares
from nemo_pvs.cli.arguments import IgnoreManifest, ParentTokens, SequenceLength
from nemo_pvs.errors import UserError
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.output_paths import check_folder
from nemo_pvs.system.progress import console, progress

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045


def tokenize(
    inputs: Annotated[list[str], typer.Argument(help="text files or folders, or wikipedia-sample")],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face folder whose tokenizer to use")],
    out: Annotated[str, typer.Option(help="folder for <split>.bin and <split>.idx")],
    split: Annotated[
        str, typer.Option(help="shares of the text by document; none may be left out of 1")
    ] = "train=0.9,validation=0.1",
    text_key: Annotated[str, typer.Option(help="key or column that holds the text")] = "text",
    seed: Annotated[int, typer.Option(help="another seed, another split")] = 0,
    workers: Annotated[int, typer.Option(help="processes that share the files out")] = 1,
) -> None:
    """Turn text into Megatron token files, split by document; an interrupted run goes on, file by file."""
    check_folder(Path(out))
    from nemo_pvs.data.shards import tokenize_files

    with locked_folder(Path(out)), progress("tokenise", "files") as show:
        made = tokenize_files(
            inputs,
            Path(tokenizer),
            Path(out),
            parse_shares(split),
            seed=seed,
            text_key=text_key,
            workers=workers,
            progress=show,
        )
    for name, manifest in made.items():
        about = f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens"
        console.print(f"{Path(out) / name}.bin: {about}", soft_wrap=True)


def train(
    initial: Annotated[str, typer.Argument(help="checkpoint with the initial weights, Hugging Face or NeMo")],
    out: Annotated[str, typer.Argument(help="run folder; an interrupted run in it is resumed")],
    data: Annotated[str, typer.Option(help="folder with train.bin and validation.bin from pvs tokenize")],
    tokens: Annotated[float, typer.Option(help="training tokens, e.g. 50e9")],
    sequence_length: SequenceLength = 8192,
    global_batch_size: Annotated[int, typer.Option(help="sequences per optimizer step")] = 512,
    micro_batch_size: Annotated[int, typer.Option(help="sequences per forward pass of a rank")] = 1,
    learning_rate: Annotated[float, typer.Option(help="peak")] = 3e-4,
    validation_samples: Annotated[int, typer.Option(help="sequences, a multiple of the global batch size")] = 512,
    tensor_parallel: Annotated[int, typer.Option(help="ranks that share every layer")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="stages that share the layers out")] = 1,
    first_stage_layers: Annotated[Optional[int], typer.Option(help="where stages are not equal")] = None,
    last_stage_layers: Annotated[Optional[int], typer.Option(help="where stages are not equal")] = None,
    data_parallel: Annotated[int, typer.Option(help="replicas that share the batch out")] = 1,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32")] = "auto",
    random_init: Annotated[bool, typer.Option(help="keep the architecture, draw the weights: the baseline")] = False,
    keep_parent_embeddings: Annotated[
        bool, typer.Option(help="of --random-init: keep embedding and norms, as the published sparse baseline does")
    ] = False,
    initialisation: Annotated[
        Optional[str], typer.Option(help="of --random-init: megatron (default), maxtext or normal (recipes/README.md)")
    ] = None,
    clip_before_mask: Annotated[
        bool, typer.Option(help="of a sparse model: clip with pruned weights in the norm, as the published runs did")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="random weights, and the order of the data unless --data-seed is given")
    ] = 1234,
    data_seed: Annotated[Optional[int], typer.Option(help="order of the data, apart from --seed")] = None,
    first_token: Annotated[
        float, typer.Option(help="where in that order to begin, e.g. behind what the parent read; rounded up to steps")
    ] = 0,
    allow_overlap: Annotated[
        bool, typer.Option(help="read again what the weights were trained on, as their ledger says")
    ] = False,
    teacher: Annotated[Optional[str], typer.Option(help="checkpoint to distil from, of the same tokenizer")] = None,
    temperature: Annotated[float, typer.Option(help="of teacher and student in the divergence")] = 1.0,
    top_k: Annotated[Optional[int], typer.Option(help="only so many of the teacher's likeliest tokens")] = None,
    lm_weight: Annotated[float, typer.Option(help="of the loss against the text, beside the divergence")] = 0.0,
    kl_weight: Annotated[float, typer.Option(help="of the divergence from the teacher")] = 1.0,
    layer_pairs: Annotated[
        Optional[str], typer.Option(help="student:teacher layers whose hidden states are compared, e.g. 4:6,8:13")
    ] = None,
    hidden_weight: Annotated[float, typer.Option(help="of the loss of their hidden states")] = 0.0,
    embedding_weight: Annotated[float, typer.Option(help="of the same loss behind the embedding")] = 0.0,
    hidden_loss: Annotated[str, typer.Option(help="cosine or mse")] = "cosine",
    dynamic_weight: Annotated[
        bool, typer.Option(help="let the losses of hidden states together weigh what the divergence does")
    ] = False,
    parent_tokens: ParentTokens = None,
    ignore_manifest: IgnoreManifest = False,
) -> None:
    """Train on NeMo and Megatron, from pruned or random weights, on text alone or on what a teacher says of it."""
    check_folder(Path(out))
    if keep_parent_embeddings and not random_init:
        raise UserError("--keep-parent-embeddings says what --random-init does not draw; give both, or neither.")
    if initialisation and not random_init:
        raise UserError("--initialisation says how --random-init draws; give both, or neither.")
    one_of("--initialisation", initialisation or "megatron", ("megatron", "maxtext", "normal"))
    if first_token < 0 or not float(first_token).is_integer():
        raise UserError(f"--first-token is {first_token:g}; give a whole number of 0 or more.")
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.data.token_files import token_file_hash
    from nemo_pvs.ledger.ledger import LEDGER
    from nemo_pvs.planning.charges import ancestry, charge_run, tokens_read
    from nemo_pvs.recipe.load import parse_layout, parse_training
    from nemo_pvs.training.prepare import prepare_job
    from nemo_pvs.training.trainer import Trainer

    distill = {
        "teacher": teacher,
        "temperature": temperature,
        "top_k": top_k,
        "lm_weight": lm_weight,
        "kl_weight": kl_weight,
        "layer_pairs": parse_pairs(layer_pairs) if layer_pairs else (),
        "hidden_weight": hidden_weight,
        "embedding_weight": embedding_weight,
        "hidden_loss": hidden_loss,
        "dynamic_weight": dynamic_weight,
    }
    if teacher is None and tuple(distill.values()) != (None, 1.0, None, 0.0, 1.0, (), 0.0, 0.0, "cosine", False):
        raise UserError(
            "--temperature, --top-k, --layer-pairs, --hidden-loss and the weights of losses are about distillation; "
            "give --teacher."
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
    # Weights that were pruned mostly come from the teacher itself, and its pretraining counts once.
    weights_from = (Path(teacher) if teacher else None) if random_init else Path(initial)
    ledger = ancestry(weights_from, parent_tokens)
    with locked_folder(Path(out)), ignoring_manifests(ignore_manifest):
        job = prepare_job(
            initial,
            Path(out),
            Path(data),
            layout,
            training,
            random_init=random_init,
            keep_parent_embeddings=keep_parent_embeddings,
            first_token=int(first_token),
            before=[] if random_init or allow_overlap else ledger.read,
        )
        read = tokens_read(token_file_hash(Path(data) / "train"), training, job.first_token)
        with Trainer(Path(out) / "launcher.log") as trainer:
            checkpoint = trainer.train(job)
        charge_run(ledger, training, open_source(checkpoint), Path(teacher) if teacher else None, read)
        for folder in (Path(out), checkpoint):  # beside the weights, so that what is made of them inherits their cost
            ledger.save(folder / LEDGER)
    console.print(f"trained checkpoint: {checkpoint}", soft_wrap=True)
