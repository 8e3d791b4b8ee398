"""The verbs about checkpoints: convert, inspect."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from nemo_pvs.cli.arguments import OUTPUT, Destination, IgnoreManifest, Overwrite, Source
from nemo_pvs.system.progress import console, progress

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

INPUT, VERIFICATION = "Input", "Verification"
"""Panels of --help."""


def convert(
    source: Source,
    target: Destination,
    to: Annotated[
        Optional[str],
        typer.Option(
            help="hf, nemo, megatron (for Megatron-Bridge and Megatron-LM) or gguf; by default gguf for a target that "
            "ends in .gguf, nemo for a Hugging Face source, else hf",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    dtype: Annotated[
        Optional[str],
        typer.Option(help="bf16, fp16 or fp32, for GGUF also q8_0; as stored by default", rich_help_panel=OUTPUT),
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            help="checksum (read the target back), logits (also run both models) or none", rich_help_panel=VERIFICATION
        ),
    ] = "checksum",
    max_shard_size: Annotated[
        Optional[str],
        typer.Option(
            help="largest weights file of a Hugging Face target, such as 500MB; 5 GB by default",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    uneven: Annotated[
        str, typer.Option(help="keep layers of different sizes, or pad them with zeros", rich_help_panel=OUTPUT)
    ] = "keep",
    text: Annotated[
        str, typer.Option(help="text for --verify logits, as --data of pvs calibrate", rich_help_panel=VERIFICATION)
    ] = "wikipedia-sample",
    config: Annotated[
        Optional[str], typer.Option(help="config.json for a bare Megatron-LM folder", rich_help_panel=INPUT)
    ] = None,
    pad_vocab_to_multiple: Annotated[
        int,
        typer.Option(
            help="pad the vocabulary of a NeMo target to a multiple of this, such as the tensor-parallel size",
            rich_help_panel=OUTPUT,
        ),
    ] = 1,
    allow_nonfinite: Annotated[
        bool, typer.Option(help="copy NaN and infinite weights instead of refusing them", rich_help_panel=INPUT)
    ] = False,
    ignore_manifest: IgnoreManifest = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert between Hugging Face, NeMo and Megatron, or to GGUF for llama.cpp, as a stream."""
    from nemo_pvs.api.convert import convert as convert_checkpoint

    converted = convert_checkpoint(
        source,
        target,
        to=to,
        dtype=dtype,
        verify=verify,
        max_shard_size=max_shard_size,
        uneven=uneven,
        text=text,
        config=config,
        pad_vocab_to_multiple=pad_vocab_to_multiple,
        allow_nonfinite=allow_nonfinite,
        ignore_manifest=ignore_manifest,
        overwrite=overwrite,
    )
    if converted.manifest is None:
        about, *notes = converted.notes
        console.print(f"{target}: {about}", soft_wrap=True)
        for note in notes:
            console.print(note, soft_wrap=True)
        return
    from nemo_pvs.checkpoints.convert import describe_checkpoint

    console.print(f"{target}: {sentence(describe_checkpoint(target))}", soft_wrap=True)
    for note in converted.notes:
        console.print(note, soft_wrap=True)
    if converted.agreement is not None:
        console.print(f"{source} and {target} have {converted.agreement}", soft_wrap=True)


def inspect(
    path: Source,
    tensors: Annotated[bool, typer.Option(help="list every tensor")] = False,
    sparsity: Annotated[bool, typer.Option(help="count the zeros of every matrix, which reads the weights")] = False,
    verify: Annotated[bool, typer.Option(help="read everything, and compare it with the manifest")] = False,
    ignore_manifest: IgnoreManifest = False,
) -> None:
    """Show what a checkpoint is; without --sparsity or --verify no weight is read."""
    from rich.table import Table
    from rich.text import Text

    from nemo_pvs.api.open_checkpoint import open_checkpoint
    from nemo_pvs.checkpoints.convert import describe, verify_or_read
    from nemo_pvs.checkpoints.sparsity import matrix_sparsity
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests

    with ignoring_manifests(ignore_manifest):
        source = open_checkpoint(path)
        about = describe(source, tensors=tensors)
        table = Table(show_header=False, box=None)
        for name, value in _description(about).items():
            table.add_row(Text(name, "bold"), value)
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
            for matrix in matrix_sparsity(source):
                mask = "none" if matrix.masked is None else f"{matrix.masked / matrix.weights:.2%} pruned"
                back = f", {matrix.disagreements:,} of them not zero" if matrix.disagreements else ""
                zeros.add_row(matrix.name, f"{matrix.zeros / matrix.weights:.2%}", matrix.pattern, mask + back)
            console.print(zeros)
        if verify:
            with progress("read and verify", "parameters") as show:
                console.print(f"{path}: {verify_or_read(source, progress=show)}", soft_wrap=True)


def _description(about: dict[str, Any]) -> dict[str, str]:
    """Return what ``pvs inspect`` says, in its order."""
    from nemo_pvs.model.shape import Shape

    sizes = {name: value for name, value in about["shape"].items() if name not in {"features", "uneven"}}
    manifest = about["manifest"]
    if manifest == "broken":
        manifest = "broken: a file is missing or has another length; --verify names it"
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
        "manifest": manifest,
    }


def sentence(about: dict[str, Any]) -> str:
    """Say in one line what ``convert.describe_checkpoint`` found."""
    from nemo_pvs.model.shape import Shape

    return f"{about['format']}, {Shape.from_dict(about['shape'])}, {about['bytes'] / 1e9:,.2f} GB"
