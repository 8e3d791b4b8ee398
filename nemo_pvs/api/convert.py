"""Converting a checkpoint between Hugging Face, NeMo and Megatron, and to GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pvs.api.values import one_of, parse_bytes, parse_dtype, tokens_of
from nemo_pvs.checkpoints.gguf import DTYPES as GGUF_DTYPES
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import check_new_file, check_new_folder
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.progress import console, progress

if TYPE_CHECKING:
    from nemo_pvs.checkpoints.manifest import Manifest
    from nemo_pvs.checkpoints.source import WeightSource
    from nemo_pvs.layerwise.agreement import Agreement


_FORMATS = ("hf", "nemo", "megatron")
"""Formats that are a folder."""
_GGUF_NAMES = {"fp32": "f32", "fp16": "f16"}
"""What llama.cpp calls the dtypes that have other names here."""


@dataclass(frozen=True)
class ConvertedModel:
    """A converted checkpoint on disk."""

    path: Path
    """Its folder, or the GGUF file."""
    manifest: Manifest | None
    """Every tensor with its checksum, and what the checkpoint was made from; None for a GGUF file."""
    agreement: Agreement | None
    """How far its logits are from those of the source; None unless ``verify="logits"``."""
    notes: tuple[str, ...] = ()
    """What a user should know about it, in sentences."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    verify: str = "checksum",
    max_shard_size: str | None = None,
    uneven: str = "keep",
    text: str | Path = "wikipedia-sample",
    config: str | Path | None = None,
    pad_vocab_to_multiple: int = 1,
    allow_nonfinite: bool = False,
    ignore_manifest: bool = False,
    overwrite: bool = False,
) -> ConvertedModel:
    """Convert between Hugging Face, NeMo and Megatron, or to GGUF; a few tensors are in memory at a time.

    Args:
        source: Checkpoint folder of any format, ``.gguf`` file, ``smollm2-135m`` or ``hf://owner/name``.
        target: The folder to write, or a file that ends in ``.gguf``.
        to: ``hf``, ``nemo``, ``megatron`` (for Megatron-Bridge and Megatron-LM) or ``gguf``; by default ``gguf`` for
            such a file, ``nemo`` for a Hugging Face source and ``hf`` for any other.
        dtype: ``bf16``, ``fp16`` or ``fp32``; for GGUF also ``q8_0``. By default as stored.
        verify: ``checksum`` reads the target back and compares every tensor, ``logits`` also runs both models,
            ``none`` does neither.
        max_shard_size: Largest weights file of a Hugging Face target, such as ``500MB``; 5 GB by default.
        uneven: ``keep`` layers of different sizes, or ``pad`` them with zeros.
        text: The text for ``verify="logits"``, as ``data`` of ``calibrate``.
        config: ``config.json`` for a bare Megatron-LM folder.
        pad_vocab_to_multiple: Pad the vocabulary of a NeMo target to a multiple of this.
        allow_nonfinite: Copy NaN and infinite weights instead of refusing them.
        ignore_manifest: Read weights that differ from the source's manifest.
        overwrite: Replace ``target``.

    Returns:
        The converted checkpoint.

    Raises:
        UserError: the source cannot be read, the target exists, or it reads back differently.

    Example:
        >>> import nemo_pvs as pvs
        >>> converted = pvs.convert(model, folder / "nemo", verify="logits", text=text)
        >>> converted.manifest.format, converted.agreement.max_difference
        ('nemo', 0.0)
    """
    target = Path(target)
    if _is_gguf(target, to):
        _check_options("gguf", max_shard_size, pad_vocab_to_multiple)
        return _convert_to_gguf(
            source,
            target,
            dtype=dtype,
            verify=one_of("--verify", verify, ("checksum", "none")),
            uneven=one_of("--uneven", uneven, ("keep", "pad")),
            config=config,
            allow_nonfinite=allow_nonfinite,
            ignore_manifest=ignore_manifest,
            overwrite=overwrite,
        )
    one_of("--verify", verify, ("checksum", "logits", "none"))
    one_of("--uneven", uneven, ("keep", "pad"))
    shard_bytes = None if max_shard_size is None else parse_bytes("--max-shard-size", max_shard_size)
    check_new_folder(target, overwrite=overwrite)
    # Imported only now: it takes seconds, and the checks above should answer at once.
    from nemo_pvs.checkpoints.convert import convert as convert_stream
    from nemo_pvs.checkpoints.convert import describe_checkpoint
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.huggingface.folder import MAX_SHARD_BYTES
    from nemo_pvs.checkpoints.megatron.how_to_load import how_to_load
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.layerwise.agreement import compare_logits

    with (
        ignoring_manifests(ignore_manifest),
        locked_target(target),
        local_checkpoint(str(source), target) as folder,
    ):
        found = describe_checkpoint(folder, config=config)["format"]
        wanted = one_of("--to", to or ("nemo" if found == "huggingface" else "hf"), _FORMATS)
        _check_options(wanted, max_shard_size, pad_vocab_to_multiple)
        reference = _reference(folder, config, str(text)) if verify == "logits" else None
        with progress(f"convert to {wanted}", "parameters") as show:
            manifest = convert_stream(
                folder,
                target,
                to=wanted,
                dtype=parse_dtype(dtype),
                max_shard_bytes=shard_bytes or MAX_SHARD_BYTES,
                pad_vocab_to_multiple=pad_vocab_to_multiple,
                allow_nonfinite=allow_nonfinite,
                uneven=one_of("--uneven", uneven, ("keep", "pad")),
                config=config,
                verify="none" if verify == "none" else "checksum",
                overwrite=overwrite,
                progress=show,
            )
        converted = open_source(folder, config)
        notes = _about_loading(open_source(target)) + _without_tokenizer(converted)
        if wanted == "megatron":
            notes += _not_converted(converted) + how_to_load(target)
        agreement = None
        if reference is not None:
            model, ids = reference
            with progress("run both models on the same tokens", "layers") as show:
                agreement = compare_logits(model, open_source(target), ids, progress=show)
    return ConvertedModel(target, manifest, agreement, notes)


def _about_loading(written: Any) -> tuple[str, ...]:
    """Return a note if not every version of Transformers loads what was written."""
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.model.layout import Layout

    if written.format != "huggingface":
        return ()
    note = Layout.for_config(written.config).loading_note(shape_of(written))
    return (note,) if note else ()


def _without_tokenizer(source: Any) -> tuple[str, ...]:
    """Return a note about a tokenizer that a NeMo training names, but does not keep in its checkpoints."""
    from nemo_pvs.checkpoints.nemo.context import tokenizer_elsewhere

    name = tokenizer_elsewhere(source.folder / "context") if source.format == "nemo" else None
    if name is None:
        return ()
    return (f"The result has no tokenizer: {source.folder} only names {name}; copy its files into the result.",)


def _not_converted(source: Any) -> tuple[str, ...]:
    """Return a note about the optimizer state of a training checkpoint, which no conversion keeps."""
    states = [name for name in source.extra_tensors if "optimizer." in name]
    if not states:
        return ()
    return (
        f"Only the weights are converted: the optimizer state of {source.folder} ({len(states):,} tensors: moments "
        "and fp32 weights) is not, so training there begins with a new optimizer.",
    )


def _is_gguf(target: Path, to: str | None) -> bool:
    """Return whether a GGUF file is wanted, which its name says.

    Raises:
        UserError: the name and ``to`` contradict each other, or ``to`` is unknown.
    """
    named = target.suffix == ".gguf"
    if to is not None and named != (one_of("--to", to, (*_FORMATS, "gguf")) == "gguf"):
        ends = "ends" if named else "does not end"
        raise UserError(f"--to is {to}, but {target} {ends} in .gguf; change one of them.")
    return named


def _check_options(wanted: str, max_shard_size: str | None, pad_vocab_to_multiple: int) -> None:
    """Refuse options that the target's format would ignore."""
    if max_shard_size is not None and wanted != "hf":
        raise UserError(
            f"--max-shard-size splits the weights of a Hugging Face folder, but the target's format is {wanted}; "
            "leave it out, or convert --to hf."
        )
    if pad_vocab_to_multiple != 1 and wanted != "nemo":
        raise UserError(
            f"--pad-vocab-to-multiple is for NeMo checkpoints, but the target's format is {wanted}; leave it out, or "
            "convert --to nemo."
        )


def _convert_to_gguf(
    source: str | Path,
    target: Path,
    *,
    dtype: str | None,
    verify: str,
    uneven: str,
    config: str | Path | None,
    allow_nonfinite: bool,
    ignore_manifest: bool,
    overwrite: bool,
) -> ConvertedModel:
    kind = None if dtype is None else one_of("--dtype", _GGUF_NAMES.get(dtype, dtype), GGUF_DTYPES)
    check_new_file(target, overwrite=overwrite)
    # Imported only now: it takes seconds, and the checks above should answer at once.
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.gguf.write import write_gguf
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.checkpoints.transforms.pad import pad_layers

    with ignoring_manifests(ignore_manifest), locked_target(target), local_checkpoint(str(source), target) as folder:
        model: WeightSource = open_source(folder, config)
        if uneven == "pad":
            model = pad_layers(model)
        with progress("convert to gguf", "parameters") as show:
            written = write_gguf(
                model,
                target,
                dtype=kind,
                allow_nonfinite=allow_nonfinite,
                verify=verify == "checksum",
                overwrite=overwrite,
                progress=show,
            )
    about = f"{written.parameters:,} parameters as {written.dtype}, llama.cpp's architecture {written.architecture}"
    return ConvertedModel(target, None, None, (about, *written.notes))


def _reference(folder: Path, config: str | Path | None, text: str) -> tuple[Any, Any]:
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
