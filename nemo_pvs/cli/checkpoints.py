"""The verbs about checkpoints: convert, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_pvs.api.values import one_of, parse_bytes, parse_dtype, tokens_of
from nemo_pvs.cli.arguments import Destination, IgnoreManifest, Overwrite, Source
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import check_new_folder
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.progress import console, progress

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045


def convert(
    source: Source,
    target: Destination,
    to: Annotated[Optional[str], typer.Option(help="hf or nemo; the other one of the source by default")] = None,
    dtype: Annotated[Optional[str], typer.Option(help="bf16, fp16 or fp32; as stored by default")] = None,
    verify: Annotated[str, typer.Option(help="checksum (read back), logits (and run both) or none")] = "checksum",
    max_shard_size: Annotated[str, typer.Option(help="of a Hugging Face weights file, e.g. 5GB or 500MB")] = "5GB",
    uneven: Annotated[str, typer.Option(help="keep layers of different sizes, or pad them with zeros")] = "keep",
    text: Annotated[str, typer.Option(help="for --verify logits: as --data of pvs calibrate")] = "wikipedia-sample",
    config: Annotated[Optional[str], typer.Option(help="config.json for a bare Megatron-LM folder")] = None,
    pad_vocab_to_multiple: Annotated[int, typer.Option(help="for NeMo: of the tensor-parallel size")] = 1,
    allow_nonfinite: Annotated[bool, typer.Option(help="copy NaN and infinite weights instead of refusing")] = False,
    ignore_manifest: IgnoreManifest = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert between Hugging Face and NeMo, as a stream."""
    one_of("--verify", verify, ("checksum", "logits", "none"))
    one_of("--uneven", uneven, ("keep", "pad"))
    shard_bytes = parse_bytes("--max-shard-size", max_shard_size)
    check_new_folder(Path(target), overwrite=overwrite)
    from nemo_pvs.checkpoints.convert import convert as convert_stream
    from nemo_pvs.checkpoints.convert import describe
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests

    with (
        ignoring_manifests(ignore_manifest),
        locked_target(Path(target)),
        local_checkpoint(source, Path(target)) as folder,
    ):
        found = describe(folder, config=config)["format"]
        wanted = one_of("--to", to or ("nemo" if found == "huggingface" else "hf"), ("hf", "nemo"))
        reference = _reference(folder, config, text) if verify == "logits" else None
        with progress(f"convert to {wanted}", "parameters") as show:
            convert_stream(
                folder,
                target,
                to=wanted,
                dtype=parse_dtype(dtype),
                max_shard_bytes=shard_bytes,
                pad_vocab_to_multiple=pad_vocab_to_multiple,
                allow_nonfinite=allow_nonfinite,
                uneven=one_of("--uneven", uneven, ("keep", "pad")),
                config=config,
                verify="none" if verify == "none" else "checksum",
                overwrite=overwrite,
                progress=show,
            )
        console.print(f"{target}: {sentence(describe(target))}", soft_wrap=True)
        if reference is not None:
            from nemo_pvs.layerwise.agreement import compare

            model, ids = reference
            with progress("run both on the same tokens", "layers") as show:
                agreement = compare(model, open_source(target), ids, progress=show)
            console.print(f"source and target, {agreement}", soft_wrap=True)


def _reference(folder: Path, config: str | None, text: str) -> tuple[Any, Any]:
    """Return what the logits of a conversion's target are compared with, before there is a target.

    Returns:
        The source, as Transformers loads it if that is its format, and token ids [4, S] of the text, S being 256 or
        the context if that is shorter. They are random where the source has no tokenizer.

    Raises:
        UserError: the source cannot be run, or not on this text.
    """
    import torch

    from nemo_pvs.checkpoints.huggingface.as_transformers_loads import AsTransformersLoads
    from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.data.assets import tokenizer_among

    source = open_source(folder, config)
    # The layers run without a mask, so a text is no longer than the attention window either.
    limits = [source.config.get(name) for name in ("max_position_embeddings", "sliding_window")]
    length = min([256, *(limit for limit in limits if limit is not None)])
    vocab = source.config["vocab_size"]
    tokenizer = tokenizer_among(source.assets)
    if tokenizer is None and not text.endswith(".bin"):
        console.print("The source has no tokenizer, so the logits are compared on random tokens.", soft_wrap=True)
        ids = torch.randint(vocab, (4, length), generator=torch.Generator().manual_seed(0))
    else:
        ids = tokens_of(tokenizer or folder, text, samples=4, sequence_length=length, seed=0).ids
    if int(ids.max()) >= vocab:
        raise UserError(
            f"The text {text} has the token {int(ids.max())}, but the model's vocabulary has {vocab} entries; for "
            "--verify logits give a --text that was tokenised for this model, or use --verify checksum."
        )
    model = AsTransformersLoads(folder) if isinstance(source, HuggingFaceSource) else source
    return model, ids


def inspect(
    path: Source,
    tensors: Annotated[bool, typer.Option(help="list every tensor")] = False,
    sparsity: Annotated[bool, typer.Option(help="count the zeros of every matrix, which reads the weights")] = False,
    verify: Annotated[bool, typer.Option(help="read everything, and compare it with the manifest")] = False,
    ignore_manifest: IgnoreManifest = False,
) -> None:
    """Show what a checkpoint is; without --sparsity or --verify no weight is read."""
    from rich.table import Table

    from nemo_pvs.checkpoints.convert import describe, verify_or_read
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.sparsity import matrix_sparsity
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests

    with ignoring_manifests(ignore_manifest), local_checkpoint(path) as folder:
        about = describe(folder, tensors=tensors)
        table = Table(show_header=False, box=None)
        for name, value in _description(about).items():
            table.add_row(f"[bold]{name}[/]", value)
        console.print(table)
        if tensors:
            listing = Table("tensor", "dtype", "size", "in Megatron")
            for tensor in about["tensors"]:
                listing.add_row(
                    tensor["name"], tensor["dtype"], " x ".join(map(str, tensor["size"])), tensor["megatron"]
                )
            console.print(listing)
        if sparsity:
            zeros = Table("matrix", "zeros", "pattern", "mask")
            for matrix in matrix_sparsity(open_source(folder)):
                mask = "none" if matrix.masked is None else f"{matrix.masked / matrix.weights:.2%} pruned"
                back = f", {matrix.disagreements:,} of them not zero" if matrix.disagreements else ""
                zeros.add_row(matrix.name, f"{matrix.zeros / matrix.weights:.2%}", matrix.pattern, mask + back)
            console.print(zeros)
        if verify:
            with progress("read and verify", "parameters") as show:
                console.print(f"{path}: {verify_or_read(folder, progress=show)}", soft_wrap=True)


def _description(about: dict[str, Any]) -> dict[str, str]:
    """Return what ``pvs inspect`` says, in its order."""
    from nemo_pvs.model.shape import Shape

    sizes = {name: value for name, value in about["shape"].items() if name not in {"features", "uneven"}}
    return {
        "format": f"{about['format']}, family {about['family']}",
        "model": str(Shape.from_dict(about["shape"])),
        **{name.replace("_", " "): f"{value:,}" if name != "tied" else str(value) for name, value in sizes.items()},
        "features": ", ".join(about["shape"].get("features", ())) or "none",
        "parameters": f"{about['parameters']:,} ({about['body_parameters']:,} without embedding and head)",
        "FLOPs per token": f"{about['flops_per_token'] / 1e9:,.3f} G in training, attention scores not counted",
        "stored": ", ".join(f"{count:,} as {dtype}" for dtype, count in about["dtypes"].items())
        + f", {about['bytes'] / 1e9:,.2f} GB",
        "masks": f"of {about['masks']:,} matrices" if about["masks"] else "none",
        "other tensors": f"{about['extra_tensors']:,} (optimizer state, buffers)",
        "other files": ", ".join(about["assets"]) or "none",
        "manifest": about["manifest"],
    }


def sentence(about: dict[str, Any]) -> str:
    """Say in a line what ``stream.describe`` found."""
    from nemo_pvs.model.shape import Shape

    return f"{about['format']}, {Shape.from_dict(about['shape'])}, {about['bytes'] / 1e9:,.2f} GB"
