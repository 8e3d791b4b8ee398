"""Writes a model as one GGUF file for llama.cpp and what is built on it, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape

from nemo_pvs.checkpoints.gguf.names import ROPE_FACTORS, ROTATES_PAIRS, gguf_name, halves_to_pairs, is_rotated
from nemo_pvs.checkpoints.gguf.quantise import BLOCK, quantise_q8_0
from nemo_pvs.checkpoints.gguf.rope import llama3_factors
from nemo_pvs.checkpoints.gguf.write_tokenizer import add_tokenizer
from nemo_pvs.checkpoints.manifest import is_finite
from nemo_pvs.checkpoints.read_ahead import ReadAhead
from nemo_pvs.checkpoints.source import Progress, WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.direct_io import StreamedReader, StreamedWriter
from nemo_pvs.system.files import check_new_file, disk_errors
from nemo_pvs.system.folder_lock import locked_target

_TORCH = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_BYTES_AT_ONCE = 1 << 24
_PLAIN_ROPE = ("default", None)


@dataclass(frozen=True)
class Written:
    """A finished GGUF file."""

    path: Path
    architecture: str
    """llama.cpp's name of the model's graph."""
    dtype: str
    parameters: int
    notes: tuple[str, ...] = ()
    """What a user should know about it, in sentences."""


@dataclass(frozen=True)
class _Part:
    """The header or a tensor as it was written."""

    name: str
    begin: int
    bytes: int
    checksum: str


def write_gguf(
    source: WeightSource,
    target: Path,
    *,
    dtype: str | None = None,
    name: str | None = None,
    allow_nonfinite: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a model with its tokenizer as a GGUF file.

    Vectors stay fp32. Layers of different sizes are written for llama.cpp's graph ``deci``, whose sizes are per layer.

    Args:
        source: The model.
        target: The file to make.
        dtype: How matrices are stored, one of ``gguf.DTYPES``; by default as most of the source's are.
        name: The model's name in the file; by default that of the file.
        allow_nonfinite: Write NaN and infinite values instead of refusing the tensors that have them.
        verify: Read the file back, before it gets its name, and compare every tensor with what was written.
        overwrite: Replace an existing ``target``.
        progress: Called with (done, total) parameters.

    Raises:
        UserError: llama.cpp would compute something else, the tokenizer cannot be expressed, ``target`` exists or
            cannot be written, or it does not read back as written, in which case it is not kept.
    """
    check_new_file(target, overwrite=overwrite)
    shape, layout = shape_of(source), Layout.for_config(source.config)
    config = {**layout.defaults, **source.config}
    architecture = architecture_of(layout, shape)
    _check_attention(config, layout, shape)
    names = list(layout.parts(shape))
    reads = ReadAhead(source, names)
    first = {names[0]: reads.read(names[0])}  # says the dtype, unless that is given
    kind = dtype or _dtype_of(first[names[0]].dtype)
    writer = GGUFWriter(None, architecture)
    _add_keys(writer, config, shape, name or target.stem, kind)
    notes = add_tokenizer(writer, source.assets, config, shape.vocab)
    extra = _rope(writer, architecture, config, shape)
    sizes = {tensor: part.size(shape) for tensor, (part, _) in layout.parts(shape).items()}
    for tensor, values in extra.items():
        writer.add_tensor_info(tensor, values.shape, values.dtype, values.nbytes, GGMLQuantizationType.F32)
    for tensor in names:
        _declare(writer, gguf_name(tensor), sizes[tensor], _type_of(sizes[tensor], kind))
    done = 0
    with locked_target(target), _partial(target) as partial, disk_errors(target):
        header = _header(writer, partial)
        file = StreamedWriter(partial)
        parts = [_append(file, "its header", [header])]
        for tensor, values in extra.items():
            parts.append(_append(file, tensor, [values]))
        for tensor in names:
            weight = first.pop(tensor) if tensor in first else reads.read(tensor)
            if tuple(weight.shape) != sizes[tensor]:
                raise UserError(f"{tensor} is {list(weight.shape)}, but the config implies {list(sizes[tensor])}.")
            if architecture in ROTATES_PAIRS and is_rotated(tensor):
                weight = halves_to_pairs(weight, shape.head_dim)
            pieces = _stored(tensor, weight, _type_of(sizes[tensor], kind), allow_nonfinite=allow_nonfinite)
            parts.append(_append(file, gguf_name(tensor), pieces))
            done += weight.numel()
            if progress:
                progress(done, shape.parameters)
        file.close()
        if verify and (changed := _changed_parts(partial, parts)):
            raise UserError(
                f"{target} was not kept, since {changed[0]} does not read back as written; check the disk and convert "
                "again."
            )
    if kind == "q8_0" and any(len(size) > 1 and size[-1] % BLOCK for size in sizes.values()):
        notes.append(
            f"Matrices whose rows are no multiple of {BLOCK} weights are stored as f16, since q8_0 cannot hold them; "
            "prune with sizes that are such multiples to avoid it."
        )
    return Written(target, architecture, kind, shape.parameters, tuple(notes))


def _header(writer: GGUFWriter, scratch: Path) -> npt.NDArray[np.uint8]:
    """Return what is in front of the tensors, which the writer of gguf can only write into a file."""
    writer.write_header_to_file(scratch)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return np.fromfile(scratch, np.uint8)


def _append(file: StreamedWriter, name: str, pieces: Iterable[npt.NDArray[Any]]) -> _Part:
    """Append the pieces of a tensor, and zeros up to where the next one may begin."""
    begin, digest = file.tell(), xxhash.xxh3_128()
    for piece in pieces:
        data = np.ascontiguousarray(piece).data
        digest.update(data)
        file.write(data)
    part = _Part(name, begin, file.tell() - begin, digest.hexdigest())
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
    return part


def _changed_parts(path: Path, parts: Iterable[_Part]) -> list[str]:
    """Return the names of a file's parts that do not read back as written."""
    buffer = memoryview(bytearray(_BYTES_AT_ONCE))
    changed = []
    with StreamedReader(path) as file:
        for part in parts:
            digest = xxhash.xxh3_128()
            file.seek(part.begin)
            for done in range(0, part.bytes, _BYTES_AT_ONCE):
                piece = buffer[: part.bytes - done]
                digest.update(piece[: file.readinto(piece)])
            if digest.hexdigest() != part.checksum:
                changed.append(part.name)
    return changed


def architecture_of(layout: Layout, shape: Shape) -> str:
    """Return the architecture whose graph in llama.cpp computes what this model does.

    Raises:
        UserError: there is none.
    """
    family = layout.family
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UserError(
            f"There is no GGUF architecture for the family {family} here; known are llama, mistral, qwen2, qwen3."
        )
    biased = {feature for feature in shape.features if feature.endswith("bias")}
    if family == "qwen3" and (shape.uneven or biased):
        what = "layers of different sizes" if shape.uneven else "biases"
        raise UserError(
            f"llama.cpp has no graph for Qwen 3 with {what}; "
            + ("pad them with pvs convert --uneven pad." if shape.uneven else "use a method that adds no biases.")
        )
    if shape.uneven:
        return "deci"
    if family == "qwen2" and shape.heads * shape.head_dim == shape.hidden:
        return "qwen2"
    # Unlike the graph qwen2, that of llama has any head size, and biases if there are some.
    return "qwen3" if family == "qwen3" else "llama"


def _check_attention(config: Mapping[str, Any], layout: Layout, shape: Shape) -> None:
    """Refuse a sliding window that is shorter than the context: llama.cpp attends to everything."""
    window, context = config.get("sliding_window"), int(config["max_position_embeddings"])
    used = config.get("use_sliding_window", layout.family == "mistral")
    if used and window is not None and int(window) < context:
        raise UserError(
            f"The model attends to a window of {int(window):,} tokens, but llama.cpp's graph attends to all of the "
            f"context of {context:,}; set max_position_embeddings in config.json to the window, within which both are "
            "the same."
        )


def _dtype_of(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.float16: "f16"}.get(dtype, "bf16")


def _add_keys(writer: GGUFWriter, config: Mapping[str, Any], shape: Shape, name: str, kind: str) -> None:
    """Add the sizes; those that llama.cpp would otherwise guess from others are always stated."""
    layers = shape.layer_sizes
    quantisation = GGMLQuantizationType[kind.upper()]
    file_type = LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"]
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    if quantisation == GGMLQuantizationType.Q8_0:
        writer.add_quantization_version(2)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length([size.ffn for size in layers] if shape.uneven else shape.ffn)
    writer.add_head_count([size.heads for size in layers] if shape.uneven else shape.heads)
    writer.add_head_count_kv([size.kv_groups for size in layers] if shape.uneven else shape.kv_groups)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(config["rope_theta"]))


def _rope(
    writer: GGUFWriter, architecture: str, config: Mapping[str, Any], shape: Shape
) -> dict[str, npt.NDArray[np.float32]]:
    """Add the keys of a rope scaling, and return the tensors that express it.

    Raises:
        UserError: llama.cpp has no equivalent.
    """
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in _PLAIN_ROPE:
        return {}
    if kind == "linear":
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
        writer.add_float32(f"{architecture}.rope.scaling.factor", float(scaling["factor"]))
        return {}
    if kind == "llama3" and architecture in ROTATES_PAIRS:
        factors = llama3_factors(scaling, float(config["rope_theta"]), shape.head_dim)
        return {ROPE_FACTORS: factors.astype(np.float32)}
    raise UserError(
        f"llama.cpp's graph {architecture} has no equivalent of the rope scaling {kind}; it supports only "
        f"{'none, linear and llama3' if architecture in ROTATES_PAIRS else 'none and linear'}."
    )


def _type_of(size: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    quantisation = GGMLQuantizationType[kind.upper()]
    if len(size) == 1:
        return GGMLQuantizationType.F32
    if quantisation == GGMLQuantizationType.Q8_0 and size[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return quantisation


def _declare(writer: GGUFWriter, name: str, size: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    stored = quant_shape_to_byte_shape(size, kind)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), kind)


def _stored(
    name: str, weight: torch.Tensor, kind: GGMLQuantizationType, *, allow_nonfinite: bool
) -> Iterator[npt.NDArray[Any]]:
    """Yield the bytes of a tensor in its type, some rows at a time: the disk writes while the next are prepared."""
    rows = weight if weight.ndim > 1 else weight[None]
    for piece in rows.split(max(1, _BYTES_AT_ONCE // (rows.shape[1] * rows.itemsize))):
        if kind == GGMLQuantizationType.Q8_0:
            if not allow_nonfinite and not is_finite(piece):
                raise _nonfinite(name, "")
            yield quantise_q8_0(piece)
        else:
            cast = piece.to(_TORCH[kind]).contiguous()
            if not allow_nonfinite and not is_finite(cast):
                raise _nonfinite(name, f" as {kind.name.lower()}")
            yield cast.view(torch.uint8).numpy()


def _nonfinite(name: str, cast: str) -> UserError:
    return UserError(
        f"{name} has NaN or infinite values{cast}, so the model cannot compute anything; use an intact checkpoint or "
        "another --dtype, or copy it as it is with --allow-nonfinite."
    )


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of a file, which becomes the file when the block ends without an error."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
