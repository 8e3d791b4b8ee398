"""The ``torch_dist`` format (PyTorch DCP as Megatron writes it), read and written in slices without a model.

A tensor has a global size and is stored as chunks, each at an offset; ``.metadata`` says which file holds which chunk.
Needs no NeMo, no Megatron, no process group and no GPU.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import _get_layout

from nemo_pvs.checkpoints.files.pytorch_bin import enum_member
from nemo_pvs.checkpoints.files.safetensors_file import tensor_bytes
from nemo_pvs.errors import UserError
from nemo_pvs.system.direct_io import StreamedReader, StreamedWriter
from nemo_pvs.system.files import write_json

_DATA = "__0_0.distcp"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

_CLASS_NAMES = {
    *metadata.__all__,
    "_MEM_FORMAT_ENCODING",
    "SavePlan",
    "WriteItem",
    "WriteItemType",
    "TensorWriteData",
    "BytesIOWriteData",
    "_StorageInfo",
    "_StoragePrefix",
}
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"

# Everything that a .metadata file may legitimately name. Megatron also stores its save plan there; its own two classes
# only add a field for optimizer states to PyTorch's, which can therefore replace them.
_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (module.__name__, name): value
        for module in (metadata, planner, filesystem)
        for name, value in vars(module).items()
        if name in _CLASS_NAMES
    },
    (_MEGATRON, "MCoreMetadata"): metadata.Metadata,
    (_MEGATRON, "MCoreSavePlan"): planner.SavePlan,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("collections", "OrderedDict"): OrderedDict,
    **{("pathlib", name): getattr(pathlib, name) for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")},
}


@dataclass(frozen=True)
class TensorBlock:
    """A piece of one stored tensor, created when it is written."""

    name: str
    """Name of the stored tensor."""
    full_size: tuple[int, ...]
    """Size of the stored tensor."""
    offset: tuple[int, ...]
    """Position of the block in the stored tensor."""
    size: tuple[int, ...]
    """Size of the block."""
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    """Returns the block."""


def write_torch_dist(folder: Path, blocks: Iterable[TensorBlock], empty_objects: Iterable[str]) -> None:
    """Write a checkpoint of weights, one block in memory at a time.

    Each block's ``make`` is called once, in order, before the next block is requested.

    Args:
        folder: Receives ``.metadata``, the data file, ``common.pt`` and ``metadata.json``; created if needed.
        blocks: They must cover every tensor that they name.
        empty_objects: Names under which Megatron expects a pickled object and accepts None instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = metadata.Metadata({}, storage_data={}, storage_meta=metadata.StorageMeta())
    file = StreamedWriter(folder / _DATA)
    for name in empty_objects:
        description.state_dict_metadata[name] = metadata.BytesStorageMetadata()
        _append(file, [None], metadata.MetadataIndex(name), description)  # Megatron pickles an object as a list of one
    for block in blocks:
        stored = description.state_dict_metadata.setdefault(
            block.name,
            metadata.TensorStorageMetadata(
                metadata.TensorProperties(dtype=block.dtype), torch.Size(block.full_size), chunks=[]
            ),
        )
        assert isinstance(stored, metadata.TensorStorageMetadata)
        offset = torch.Size(block.offset)
        index = metadata.MetadataIndex(block.name, offset, len(stored.chunks))
        stored.chunks.append(metadata.ChunkStorageMetadata(offset, torch.Size(block.size)))
        # torch.save writes a view's whole storage; this tensor has only the block's bytes.
        exact = torch.frombuffer(tensor_bytes(block.make()), dtype=block.dtype).view(block.size)
        _append(file, exact, index, description)
    file.close()
    (folder / ".metadata").write_bytes(pickle.dumps(description))
    write_common(folder)
    write_json(folder / "metadata.json", _FORMAT)


def write_common(folder: Path, **values: Any) -> None:
    """Write ``common.pt``, which holds what is not a tensor, with ``values`` in addition to what Megatron needs."""
    torch.save({"content_metadata": _CONTENT, **values}, folder / "common.pt")


def _append(file: StreamedWriter, value: Any, index: metadata.MetadataIndex, description: metadata.Metadata) -> None:
    """Append one item as PyTorch's reader expects it, and record its position in the description."""
    begin = file.tell()
    torch.save(value, cast(Any, file))
    description.storage_data[index] = filesystem._StorageInfo(_DATA, begin, file.tell() - begin)


class TorchDistReader:
    """A checkpoint from which any slice of any tensor can be read on its own."""

    check_crc: bool = True
    """Whether to verify the CRC-32 that PyTorch writes but never checks, at 4 GB/s; for readers without a better
    checksum."""

    def __init__(self, folder: Path) -> None:
        """Read the description of the checkpoint.

        Raises:
            UserError: there is none, it is broken, or it would run code.
        """
        self._folder = folder
        description = _read_description(folder / ".metadata")
        self._storage: Mapping[metadata.MetadataIndex, filesystem._StorageInfo] = description.storage_data
        self._tensors = {
            name: stored
            for name, stored in description.state_dict_metadata.items()
            if isinstance(stored, metadata.TensorStorageMetadata)
        }

    @property
    def files(self) -> list[Path]:
        """The checkpoint's data files and their description."""
        names = {item.relative_path for item in self._storage.values()}
        return [self._folder / name for name in (".metadata", *sorted(names))]

    def truncated_files(self) -> list[str]:
        """Return the data files that are missing or shorter than the description says; reads no data."""
        ends: dict[str, int] = {}
        for item in self._storage.values():
            ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
        files = ((self._folder / name, end) for name, end in ends.items())
        return sorted(file.name for file, end in files if not file.is_file() or file.stat().st_size < end)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, the optimizer's included."""
        return list(self._tensors)

    def size(self, name: str) -> tuple[int, ...]:
        """Return the global size of a tensor.

        Raises:
            UserError: there is no such tensor.
        """
        return tuple(self._stored(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor.

        Raises:
            UserError: there is no such tensor.
        """
        return self._stored(name).properties.dtype

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """Return the slice of a tensor that starts at ``offset`` and has ``size``, as a fresh copy.

        Raises:
            UserError: there is no such tensor, or a file with a part of it is missing or broken.
        """
        stored = self._stored(name)
        wanted = metadata.ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        pieces = create_read_items_for_chunk_list(name, stored, [wanted])
        if sum(math.prod(piece.lengths) for piece in pieces) != math.prod(size):
            raise UserError(f"{self._folder} contains only a part of {name}; copy the checkpoint again.")
        try:
            if len(pieces) == 1:
                return self._read_piece(pieces[0], stored.properties.dtype)
            tensor = torch.empty(size, dtype=stored.properties.dtype)
            for piece in pieces:
                target = _narrow(tensor, piece.dest_offsets, piece.lengths)
                target.copy_(self._read_piece(piece, stored.properties.dtype))
            return tensor
        except _READ_ERRORS as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"Cannot read {name} from {self._folder} ({reason}); copy the checkpoint again."
            ) from error

    def _read_piece(self, piece: ReadItem, dtype: torch.dtype) -> torch.Tensor:
        """Return the wanted part of one stored chunk."""
        item = self._storage[piece.storage_index]
        with StreamedReader(self._folder / item.relative_path) as file:
            saved: Any = _create_file_view(file, item.offset, item.length)
            if self.check_crc:
                saved = io.BytesIO(saved.read(item.length))
                _check_crc(saved)
            chunk = torch.load(saved, map_location="cpu", weights_only=True)
        if not isinstance(chunk, torch.Tensor):
            raise ValueError("it is not a tensor")
        part = _narrow(chunk, piece.storage_offsets, piece.lengths).to(dtype)
        # A small part must not keep the whole chunk in memory; a large one is not worth another copy.
        return part.clone() if 2 * part.nbytes < part.untyped_storage().nbytes() else part

    def _stored(self, name: str) -> metadata.TensorStorageMetadata:
        if name not in self._tensors:
            raise UserError(f"{self._folder} has no tensor {name}; is this a checkpoint of a Llama-family model?")
        return self._tensors[name]


_READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    AttributeError,
    TypeError,
    NotImplementedError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions that reading a damaged chunk can raise."""


def _check_crc(saved: io.BytesIO) -> None:
    """Raise ValueError if a part of an archive written by ``torch.save`` does not match its checksum.

    PyTorch can be told to leave checksums out (``set_crc32_options``). Then those of all parts are wrong, including
    that of the small pickle without which nothing can be loaded, and nothing can be verified.
    """
    with zipfile.ZipFile(saved) as archive:
        wrong = []
        for part in archive.namelist():
            try:
                with archive.open(part) as stream:
                    while stream.read(1 << 20):
                        pass
            except zipfile.BadZipFile:
                wrong.append(part)
        if wrong and not any(part.endswith("/data.pkl") for part in wrong):
            raise ValueError(f"{wrong[0]} does not match its checksum")
    saved.seek(0)


def _narrow(tensor: torch.Tensor, offsets: Iterable[int], lengths: Iterable[int]) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _read_description(path: Path) -> metadata.Metadata:
    """Read ``.metadata``, which is a pickle, without running any of its code."""
    try:
        with open(path, "rb") as file:
            description = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no .metadata file, so it is not a torch_dist checkpoint; a zarr checkpoint of an "
            "older NeMo must first be saved again with NeMo 2."
        ) from None
    except UserError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise UserError(f"{path} is broken ({error}); copy the checkpoint again.") from error
    if not _is_sound(description):
        raise UserError(f"{path} does not describe a checkpoint; copy the checkpoint again.")
    return cast(metadata.Metadata, description)


def _is_sound(description: Any) -> bool:
    """Return whether a description has the types that its classes declare and enough bytes for every chunk.

    It comes from a pickle, which can set any field to anything.
    """
    try:
        if not isinstance(description, metadata.Metadata) or not isinstance(description.storage_data, dict):
            return False
        room: dict[tuple[str, torch.Size], int] = {}
        for index, item in description.storage_data.items():
            file = item.relative_path
            if not isinstance(file, str) or Path(file).name != file or not _is_size((item.offset, item.length)):
                return False
            room[index.fqn, torch.Size(index.offset or ())] = item.length
        for name, stored in description.state_dict_metadata.items():
            if isinstance(stored, metadata.BytesStorageMetadata):
                continue
            dtype = stored.properties.dtype
            if not isinstance(name, str) or not isinstance(dtype, torch.dtype) or not _is_size(stored.size):
                return False
            for chunk in stored.chunks:
                if not (_is_size(chunk.offsets) and _is_size(chunk.sizes)):
                    return False
                if len({len(chunk.offsets), len(chunk.sizes), len(stored.size)}) != 1:
                    return False
                stored_bytes = room.get((name, torch.Size(chunk.offsets)), math.inf)  # if missing, reading it fails
                if math.prod(chunk.sizes) * dtype.itemsize > stored_bytes:
                    return False
    except (AttributeError, KeyError, TypeError):
        return False
    return True


def _is_size(numbers: Iterable[Any]) -> bool:
    return all(isinstance(number, int) and number >= 0 for number in numbers)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name == "getattr":
            return _enum_member
        try:
            return _METADATA_CLASSES[module, name]
        except KeyError:
            raise _foreign(f"{module}.{name}") from None


def _enum_member(members: Any, name: Any) -> Any:
    try:
        return enum_member(members, name)
    except pickle.UnpicklingError:
        raise _foreign("builtins.getattr") from None


def _foreign(name: str) -> UserError:
    return UserError(
        f"The .metadata of this checkpoint names {name}, which does not belong in a checkpoint's description and "
        "could run code; get the checkpoint from a source that you trust."
    )
