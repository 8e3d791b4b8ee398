"""Reads and writes NeMo 2 checkpoints, one layer's slice in memory at a time.

``weights/`` is a torch_dist checkpoint that stores a tensor of all layers as one tensor ``[layers, ...]`` (for uneven
layers: as one tensor per layer), fused as in Megatron and independent of the parallelism that wrote it. ``context/``
describes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.files.torch_dist import TensorBlock, TorchDistReader, write_torch_dist
from nemo_pvs.checkpoints.fingerprint import same_values
from nemo_pvs.checkpoints.huggingface.shards import few
from nemo_pvs.checkpoints.manifest import Manifest, Recorder
from nemo_pvs.checkpoints.masks import FILE, MaskFile, Masks, NoMasks, masks_of, write_masks
from nemo_pvs.checkpoints.nemo.context import check_for_nemo, context_assets, read_context, write_context
from nemo_pvs.checkpoints.source import Progress, WeightSource
from nemo_pvs.checkpoints.stored_tensors import StoredTensors
from nemo_pvs.checkpoints.tensor_record import TensorRecord, dtype_name
from nemo_pvs.checkpoints.transforms.biases import with_both_biases
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Entry, Layout, TensorPart
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.files import whole_folder
from nemo_pvs.system.progress import say_once

_LAYERS = "module.decoder.layers."
_EMBEDDING = "module.embedding.word_embeddings.weight"
_HEAD = "module.output_layer.weight"

# Modules without weights that have an extra state in some versions of Transformer Engine.
_WEIGHTLESS_MODULES = ("self_attention.core_attention",)


class NemoSource:
    """A NeMo checkpoint: an imported model, one of ours, or a training checkpoint (its optimizer is not read)."""

    format = "nemo"
    """The format's name in manifests and descriptions."""

    def __init__(self, folder: str | Path) -> None:
        """Open a checkpoint; no weight is read yet.

        Raises:
            UserError: it is not a torch_dist checkpoint of a Llama-family model, or its context does not fit it.
        """
        self.folder = Path(folder)
        self._weights = self._open_weights()
        config = self._read_config(
            vocab_rows=self._weights.size(_EMBEDDING)[0], dtype=dtype_name(self._weights.dtype(_EMBEDDING))
        )
        if self._has_own_head(Layout.for_config(config).shape(config)):
            say_once(
                f"{self.folder} ties the output head to the embedding in its config but stores a different head: the "
                "head is kept and the model untied."
            )
            config = {**config, "tie_word_embeddings": False}
        self.config: Mapping[str, Any] = config
        self._shape = Layout.for_config(self.config).shape(self.config)
        layout = Layout.for_config(self.config)
        self._check_layers()
        self._parts = layout.parts(self._shape)
        # Megatron can be told to store even layers separately as well.
        self._stacked = not any(name.startswith(f"{_LAYERS}0.") for name in self._weights.names)
        self._check_sizes(layout)
        self._refuse_unknown_tensors()
        self._siblings: dict[str, torch.Tensor] = {}
        self._stored = StoredTensors(self.folder, self._weights.files)
        self._weights.check_crc = self._stored.manifest is None

    def _open_weights(self) -> TorchDistReader:
        return TorchDistReader(self.folder / "weights")

    def _read_config(self, *, vocab_rows: int, dtype: str) -> Mapping[str, Any]:
        return read_context(self.folder / "context", vocab_rows=vocab_rows, dtype=dtype)

    @property
    def assets(self) -> tuple[Path, ...]:
        """Tokenizer files and generation config."""
        return context_assets(self.folder / "context")

    @property
    def _masks_path(self) -> Path:
        return self.folder / "context" / FILE

    @cached_property
    def masks(self) -> Masks:
        """The masks stored with the model; most models have none."""
        path = self._masks_path
        sizes = {name: part.size(self._shape) for name, (part, _) in self._parts.items()}
        if not path.is_file():
            return NoMasks()
        masks = MaskFile(path, sizes)
        self._stored.check_file(path)
        return masks

    @property
    def extra_tensors(self) -> tuple[str, ...]:
        """Stored tensors that are not weights of the model, such as optimizer states."""
        known = {self._name(entry) for _, entry in self._parts.values()}
        return tuple(name for name in self._weights.names if name not in known)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._weights.dtype(self._name(self._parts[name][1]))

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its Hugging Face name, without padding rows.

        A fused tensor is read once for all its parts if they are requested consecutively; each part is returned once
        and then forgotten, so a caller may modify it.

        Raises:
            UserError: the model has no such tensor, its file is missing or broken, or the tensor differs from the
                manifest.
        """
        if name not in self._siblings:
            if name not in self._parts:
                raise UserError(f"The model in {self.folder} has no tensor {name}.")
            entry = self._parts[name][1]
            parts = entry.split(self._read_entry(entry), self._shape)
            self._siblings = dict(zip((part.name for part in entry.parts), parts, strict=True))
        tensor = self._siblings.pop(name)
        self._stored.check(name, tensor)
        return tensor

    @property
    def manifest(self) -> Manifest | None:
        """The manifest that tensors are compared with as they are read; None if there is none or it is ignored."""
        return self._stored.manifest

    def checksums(self) -> Mapping[str, TensorRecord]:
        """Return the checksum of every tensor (``StoredTensors.checksums``)."""
        return self._stored.checksums(self)

    def _name(self, entry: Entry) -> str:
        return stored_name(entry, stacked=self._stacked)

    def _read_entry(self, entry: Entry) -> torch.Tensor:
        size = entry.size(self._shape)
        if entry.layer is None or not self._stacked:
            return self._weights.read(self._name(entry), (0,) * len(size), size)
        return self._weights.read(self._name(entry), (entry.layer, *(0 for _ in size)), (1, *size)).squeeze(0)

    def _check_layers(self) -> None:
        """Refuse more layers than the files can hold, before anything is allocated per layer."""
        names = [name for name in self._weights.names if name.startswith(_LAYERS)]
        stored = max([len(names), *(self._weights.size(name)[0] for name in names if self._weights.size(name))])
        if self._shape.layers > stored:
            raise UserError(
                f"The context of {self.folder} says {self._shape.layers:,} layers, but there are weights for at most "
                f"{stored:,}; use the context that belongs to these weights."
            )

    def _has_own_head(self, shape: Shape) -> bool:
        """Return whether a model that is tied by its config stores a head that differs from the embedding."""
        if not shape.tied or _HEAD not in self._weights.names:
            return False
        stored = self._weights.size(_HEAD)
        if stored != self._weights.size(_EMBEDDING) or stored[1:] != (shape.hidden,) or stored[0] < shape.vocab:
            return True
        size = (shape.vocab, shape.hidden)  # without padding rows, which may differ
        return not same_values(*(self._weights.read(name, (0, 0), size) for name in (_EMBEDDING, _HEAD)))

    def _check_sizes(self, layout: Layout) -> None:
        """Refuse weights whose sizes differ from the context's; only the vocabulary may have extra (padding) rows."""
        for entry in layout.entries(self._shape):
            name = self._name(entry)
            stored = self._weights.size(name)
            expected = _stored_size(entry, self._shape, self._shape.vocab, stacked=self._stacked)
            padded = entry.parts[0].axes[0] == "vocab" and stored[0] > expected[0]
            if stored != expected and not (padded and stored[1:] == expected[1:]):
                raise UserError(
                    f"{name} in {self.folder} is {list(stored)}, but its context implies {list(expected)}; "
                    "use the context that belongs to these weights."
                )

    def _refuse_unknown_tensors(self) -> None:
        """Refuse tensors of the model that its context does not describe: without them it would be another model."""
        # With tied embeddings, a stored head has already been found to be a copy.
        unknown = [name for name in self.extra_tensors if name.startswith("module.") and name != _HEAD]
        if unknown:
            raise UserError(
                f"{self.folder} has {len(unknown)} tensors that {self.config['architectures'][0]} with its context "
                f"does not have: {few(unknown)}; adapters and quantised weights are not supported, so use the plain "
                "model."
            )


def write_nemo(
    source: WeightSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    pad_vocab_to_multiple: int = 1,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    before_rename: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write a model as a NeMo checkpoint that NeMo loads at any tensor and pipeline parallelism.

    Stock NeMo loads even layers; the context of an uneven model names our own class (``megatron/uneven.py``). Where
    only the attention or only the MLP has biases, zeros are added for the other (``with_both_biases``).

    Args:
        source: The model.
        target: The folder to make.
        dtype: Cast every tensor to this dtype; None keeps the stored dtypes.
        pad_vocab_to_multiple: Pad the embedding and the output head with rows of zeros to a multiple of this, so that
            tensor parallelism divides them. ``NemoSource`` drops these rows.
        allow_nonfinite: Write NaN and infinite values instead of refusing the tensors that have them.
        overwrite: Replace an existing ``target``.
        progress: Called with (done, total) parameters.
        before_rename: Called with the temporary folder that is about to become ``target``; what it writes there
            appears together with the model, and an error removes everything.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        UserError: ``target`` exists or cannot be written, NeMo cannot express the config, or the source is broken.
    """
    if pad_vocab_to_multiple < 1:
        raise UserError(f"The vocabulary cannot be padded to a multiple of {pad_vocab_to_multiple}; give 1 or more.")
    recorder = Recorder(with_both_biases(source), dtype, progress, allow_nonfinite=allow_nonfinite)
    recorder.layout.require_class(recorder.shape)
    vocab_rows = -(-recorder.shape.vocab // pad_vocab_to_multiple) * pad_vocab_to_multiple
    first = recorder.dtype_of(next(iter(recorder.parts)))
    config = recorder.layout.config(recorder.shape, recorder.source.config)
    check_for_nemo({**config, "torch_dtype": dtype_name(first)}, vocab_rows=vocab_rows)
    states = extra_states(recorder.layout, recorder.shape)
    with whole_folder(Path(target), overwrite=overwrite) as folder:
        write_torch_dist(folder / "weights", weight_blocks(recorder, vocab_rows), states)
        write_context(folder / "context", recorder.config(), source.assets, vocab_rows=vocab_rows)
        if masks_of(source).names:
            write_masks(masks_of(source), folder / "context" / FILE)
        manifest = recorder.finish(folder, "nemo")
        if before_rename:
            before_rename(folder)
        return manifest


def stored_name(entry: Entry, *, stacked: bool) -> str:
    """Return the stored name of a Megatron tensor; ``stacked``: of all layers together, else of one layer."""
    if entry.layer is None:
        return f"module.{entry.megatron}"
    return f"{_LAYERS}{'' if stacked else f'{entry.layer}.'}{entry.megatron}"


def _stored_size(entry: Entry, shape: Shape, vocab_rows: int, *, stacked: bool) -> tuple[int, ...]:
    size = entry.size(shape.replace(vocab=vocab_rows))
    return (shape.layers, *size) if stacked and entry.layer is not None else size


def weight_blocks(recorder: Recorder, vocab_rows: int) -> Iterator[TensorBlock]:
    """Yield the blocks of a checkpoint in the order in which reading the source is fastest.

    Args:
        recorder: Reads the model.
        vocab_rows: Rows of the stored embedding and output head, padding included.
    """
    stacked = not recorder.shape.uneven
    dtypes: dict[str, torch.dtype] = {}
    for entry in recorder.layout.entries(recorder.shape):
        name = stored_name(entry, stacked=stacked)
        if name not in dtypes:  # a stacked tensor has one dtype, that of its first layer
            dtypes[name] = recorder.dtype_of(entry.parts[0].name)
        full_size = _stored_size(entry, recorder.shape, vocab_rows, stacked=stacked)
        layer = (entry.layer,) if stacked and entry.layer is not None else ()
        all_rows, *columns = full_size[len(layer) :]
        first_row = 0
        for rows, make in _row_blocks(recorder, entry, (all_rows, *columns), dtypes[name]):
            yield TensorBlock(
                name=name,
                full_size=full_size,
                offset=(*layer, first_row, *(0 for _ in columns)),
                size=(*(1 for _ in layer), rows, *columns),
                dtype=dtypes[name],
                make=make,
            )
            first_row += rows


def _row_blocks(
    recorder: Recorder, entry: Entry, size: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[int, Callable[[], torch.Tensor]]]:
    """Yield the blocks of an entry from its first row to its last: the number of rows and a function that makes them.

    Gate and up are separate blocks because Megatron reads their rows separately; the padding rows are another block.
    """
    pieces = [(part,) for part in entry.parts] if entry.fuse == "gate_up" else [entry.parts]
    for parts in pieces:
        rows = sum(part.size(recorder.shape)[0] for part in parts)
        yield rows, partial(_fused, recorder, entry, parts, dtype)
    padding = size[0] - entry.size(recorder.shape)[0]
    if padding:
        yield padding, partial(torch.zeros, (padding, *size[1:]), dtype=dtype)


def _fused(recorder: Recorder, entry: Entry, parts: tuple[TensorPart, ...], dtype: torch.dtype) -> torch.Tensor:
    tensors = [recorder.read(part.name) for part in parts]
    for part, tensor in zip(parts, tensors, strict=True):
        if tensor.dtype != dtype:
            raise UserError(
                f"{part.name} is {dtype_name(tensor.dtype)}, but a NeMo checkpoint stores it in one tensor with "
                f"weights in {dtype_name(dtype)}; convert with an explicit dtype."
            )
    return tensors[0] if len(tensors) == 1 else entry.join(tensors, recorder.shape)


def extra_states(layout: Layout, shape: Shape) -> list[str]:
    """Return the names of the extra states that Megatron requests where it has Transformer Engine's modules.

    These hold FP8 scales; a stored None means that there are none. Every module with weights has one, apart from the
    embedding and the output head, which are Megatron's own.
    """
    names = [
        f"module.{_module(entry)}._extra_state/shard_0_1"
        for entry in layout.entries(shape)
        if entry.layer is None and entry.parts[0].axes[0] != "vocab"
    ]
    with_weights = dict.fromkeys(_module(entry) for entry in layout.entries(shape) if entry.layer is not None)
    for layer in range(shape.layers):
        for module in (*with_weights, *_WEIGHTLESS_MODULES):
            if shape.uneven:
                names.append(f"{_LAYERS}{layer}.{module}._extra_state/shard_0_1")
            else:
                names.append(f"{_LAYERS}{module}._extra_state/shard_{layer}_{shape.layers}")
    return names


def _module(entry: Entry) -> str:
    """Return the name of the Megatron module that a tensor belongs to."""
    return entry.megatron.rpartition(".")[0]
