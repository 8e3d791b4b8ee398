"""Converts checkpoints tensor by tensor, verifies them, and describes them without loading them."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch

from nemo_pvs.checkpoints.gguf.model import GgufSource
from nemo_pvs.checkpoints.huggingface.folder import MAX_SHARD_BYTES, HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.manifest import ORIGIN, Manifest
from nemo_pvs.checkpoints.megatron.write import write_megatron
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.read_ahead import ReadAhead
from nemo_pvs.checkpoints.source import Progress, WeightSource, shape_of
from nemo_pvs.checkpoints.stored_tensors import changed_since
from nemo_pvs.checkpoints.tensor_record import dtype_name
from nemo_pvs.checkpoints.transforms.pad import pad_layers
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import LEDGER
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.megatron_run import latest_checkpoint
from nemo_pvs.system.files import check_new_folder, sha256_file


def convert(
    source_path: str | Path,
    target: str | Path,
    *,
    to: Literal["hf", "nemo", "megatron"],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    pad_vocab_to_multiple: int = 1,
    allow_nonfinite: bool = False,
    uneven: Literal["keep", "pad"] = "keep",
    config: str | Path | None = None,
    verify: Literal["checksum", "none"] = "checksum",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Convert a checkpoint and copy its ledger; memory is a few tensors, whatever the model's size.

    Args:
        source_path: A checkpoint folder of any format.
        target: The folder to make.
        to: The format of ``target``.
        dtype: Cast every tensor to this dtype; None keeps the stored dtypes.
        max_shard_bytes: For Hugging Face: maximum size of a weight file in bytes.
        pad_vocab_to_multiple: For NeMo: pad the vocabulary up to a multiple of this (``write_nemo``).
        allow_nonfinite: Write NaN and infinite values instead of refusing the tensors that have them.
        uneven: Whether to keep layers of different sizes or pad them with zeros to a stock model (``pad_layers``).
        config: As for ``open_source``.
        verify: ``checksum`` reads the target back, before it gets its name, and compares every tensor with what was
            written.
        overwrite: Replace an existing ``target``.
        progress: Called with (done, total) parameters; verification starts again at 0.

    Returns:
        The target's manifest.

    Raises:
        UserError: the source is not a checkpoint that we read, ``target`` cannot be written, or it does not read
            back as written, in which case it is not kept.
    """
    source_path, target = Path(source_path), Path(target)
    opened = open_source(source_path, config)
    source: WeightSource = pad_layers(opened) if uneven == "pad" else opened
    if source_path.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{target} is or contains the checkpoint to convert; choose another target.")
    check_new_folder(target, overwrite=overwrite)

    def complete(folder: Path) -> None:
        for name in (LEDGER, ORIGIN):
            if (opened.folder / name).is_file():
                shutil.copyfile(opened.folder / name, latest_checkpoint(folder) / name)
        if verify == "checksum":
            try:
                verify_checkpoint(folder, progress=progress)
            except UserError as error:
                reason = str(error).replace(str(folder), str(target))
                raise UserError(f"{target} was not kept, since it does not read back as written: {reason}") from error

    if to == "hf":
        manifest = write_huggingface(
            source,
            target,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            progress=progress,
            before_rename=complete,
        )
    elif to == "megatron":
        manifest = write_megatron(
            source,
            target,
            dtype=dtype,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            progress=progress,
            before_rename=complete,
        )
    else:
        manifest = write_nemo(
            source,
            target,
            dtype=dtype,
            pad_vocab_to_multiple=pad_vocab_to_multiple,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            progress=progress,
            before_rename=complete,
        )
    return manifest


def verify_checkpoint(path: str | Path, *, progress: Progress | None = None) -> Manifest:
    """Read a checkpoint that we wrote and compare every tensor and every other file with its manifest.

    Raises:
        UserError: there is no manifest, a tensor or file is missing or differs, or there is an extra tensor.
    """
    folder = latest_checkpoint(Path(path))
    manifest = Manifest.read(folder)
    if manifest is None:
        raise UserError(f"{folder} has no manifest to compare with; only checkpoints written by nemo_pvs have one.")
    changed = manifest.changed_files(folder)
    source = open_source(folder)
    expected = Layout.for_config(source.config).parts(shape_of(source))
    mismatched = sorted({*expected} ^ {*manifest.tensors}) + sorted(source.extra_tensors)
    if mismatched:
        raise UserError(
            f"{folder} does not hold exactly the tensors of its config (see {mismatched[0]}); convert it again."
        )
    for name, file in manifest.files.items():
        if name in changed or (file.sha256 is not None and sha256_file(folder / name) != file.sha256):
            raise changed_since(folder, name)
    # The source does that itself unless --ignore-manifest is set, which is about a command's source.
    read_through(source, None if source.manifest else manifest, progress=progress)
    return manifest


def verify_or_read(source: HuggingFaceSource | NemoSource | GgufSource, *, progress: Progress | None = None) -> str:
    """Verify a checkpoint, or a GGUF file, as far as possible and say what was verified.

    Raises:
        UserError: a part of it cannot be read, or differs from its manifest or from the checksums in its files.
    """
    if source.manifest is not None:
        manifest = verify_checkpoint(source.folder, progress=progress)
        return f"all {len(manifest.tensors):,} tensors and {len(manifest.files):,} files are as written"
    read_through(source, progress=progress)
    if isinstance(source, NemoSource):
        return "every tensor could be read and has the checksum of PyTorch's archive; there is no manifest"
    return "every tensor could be read; there is no manifest to compare with"


def read_through(
    source: HuggingFaceSource | NemoSource | GgufSource,
    manifest: Manifest | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Read every tensor of a checkpoint; the source compares each with its manifest if there is one.

    Args:
        source: The checkpoint.
        manifest: Compare with this one, even where the source's own is ignored (``ignoring_manifests``).
        progress: Called with (done, total) parameters.

    Raises:
        UserError: a tensor cannot be read, or is not what was written.
    """
    shape = shape_of(source)
    names = Layout.for_config(source.config).parts(shape)
    reads = ReadAhead(source, names)
    done = 0
    for name in names:
        tensor = reads.read(name)
        if manifest is not None and not manifest.describes(name, tensor):
            raise changed_since(source.folder, name)
        done += tensor.numel()
        if progress:
            progress(done, shape.parameters)


def describe_checkpoint(
    path: str | Path, *, tensors: bool = False, config: str | Path | None = None
) -> dict[str, Any]:
    """Describe a checkpoint without reading its weights.

    Args:
        path: A checkpoint folder of any format.
        config: As for ``open_source``.
        tensors: As for ``describe``.

    Returns:
        As ``describe``.

    Raises:
        UserError: it is not a checkpoint that we read.
    """
    return describe(open_source(path, config), tensors=tensors)


def describe(source: HuggingFaceSource | NemoSource | GgufSource, *, tensors: bool = False) -> dict[str, Any]:
    """Describe a model without reading its weights.

    Args:
        source: The checkpoint, or a GGUF file.
        tensors: Add ``tensors``: the name, dtype, size, Megatron name and layer of each.

    Returns:
        ``format`` (huggingface, nemo, megatron or gguf), ``family``, ``shape``, ``parameters``, ``body_parameters``,
        ``flops_per_token`` (training, without attention), ``dtypes`` (parameters by dtype), ``bytes`` of weights,
        ``masks`` (number of matrices that have one), ``extra_tensors`` (number of stored tensors that are not weights
        of the model), ``assets`` (file names) and ``manifest``: absent, complete (all its files exist and have the
        recorded length) or broken.
    """
    shape = Layout.for_config(source.config).shape(source.config)
    layout = Layout.for_config(source.config)
    parts = layout.parts(shape)
    dtypes: Counter[torch.dtype] = Counter()
    for name, (part, _) in parts.items():
        dtypes[source.dtype(name)] += math.prod(part.size(shape))
    description: dict[str, Any] = {
        "format": source.format,
        "family": layout.family,
        "shape": shape.to_dict(),
        "parameters": shape.parameters,
        "body_parameters": shape.body_parameters,
        "flops_per_token": shape.flops_per_token(training=True),
        "dtypes": {dtype_name(dtype): count for dtype, count in dtypes.items()},
        "bytes": sum(count * dtype.itemsize for dtype, count in dtypes.items()),
        "masks": len(source.masks.names),
        "extra_tensors": len(source.extra_tensors),
        "assets": [asset.name for asset in source.assets],
        "manifest": "absent" if source.format == "gguf" else _manifest_status(source.folder),
    }
    if tensors:
        description["tensors"] = []
        for name, (part, entry) in parts.items():
            tensor = {
                "name": name,
                "dtype": dtype_name(source.dtype(name)),
                "size": list(part.size(shape)),
                "megatron": entry.megatron,
                "layer": entry.layer,
            }
            description["tensors"].append(tensor)
    return description


def _manifest_status(folder: Path) -> str:
    manifest = Manifest.read(folder)
    if manifest is None:
        return "absent"
    return "broken" if manifest.changed_files(folder) else "complete"
