"""The ``torch_dist`` format (PyTorch DCP as Megatron writes it), read and written in slices without a model.

A tensor has a global size and is stored as chunks, each at an offset; ``.metadata`` says which file holds which chunk.
Needs no NeMo, no Megatron, no process group and no GPU.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.serialization import _get_layout

from nemo_pvs.errors import UserError
from nemo_pvs.files import write_json

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

# All that a .metadata file has reason to name. Megatron keeps its saving plan in there, too; its own two classes only
# add a field for optimizer states to PyTorch's, which can therefore stand in for them.
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
class Block:
    """A piece of one stored tensor, made when its turn comes to be written."""

    name: str
    full_size: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def write_torch_dist(folder: Path, blocks: Iterable[Block], empty_objects: Iterable[str]) -> None:
    """Write a checkpoint of weights, calling each block's ``make`` once, in order.

    Memory is one block, and the last block of every name, which PyTorch's writer holds on to.

    Args:
        folder: Where ``.metadata``, the data file, ``common.pt`` and ``metadata.json`` go; made if needed.
        blocks: They must cover every tensor that they name.
        empty_objects: Names under which Megatron expects a pickled object and accepts None in its place.
    """
    writer = _Writer(folder, thread_count=1, per_thread_copy_ahead=0, overwrite=False)
    lazy = _LazyPlanner(blocks)
    items = [WriteItem(metadata.MetadataIndex(name), WriteItemType.BYTE_IO) for name in empty_objects]
    plan = writer.prepare_local_plan(SavePlan([*lazy.items(), *items]))
    [plan], description = create_default_global_save_plan([plan])
    [plan] = writer.prepare_global_plan([plan])
    writer.finish(description, [writer.write_data(plan, lazy).value()])
    torch.save({"content_metadata": _CONTENT}, folder / "common.pt")
    write_json(folder / "metadata.json", _FORMAT)


class TorchDistReader:
    """A checkpoint of which any slice of any tensor can be read without the rest."""

    def __init__(self, folder: Path) -> None:
        """Read the description of the checkpoint.

        Raises:
            UserError: there is none, it is broken, or it asks for code to be run.
        """
        self._folder = folder
        self._files = _Reader(folder)
        description = self._files.read_metadata()
        self._files.set_up_storage_reader(description, is_coordinator=True)
        self._tensors = {
            name: stored
            for name, stored in description.state_dict_metadata.items()
            if isinstance(stored, metadata.TensorStorageMetadata)
        }

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
            UserError: there is no such tensor, or a file that holds a part of it is missing or broken.
        """
        stored = self._stored(name)
        slice_ = metadata.ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        items = create_read_items_for_chunk_list(name, stored, [slice_])
        if sum(math.prod(item.lengths) for item in items) != math.prod(size):
            raise UserError(f"{self._folder} holds only a part of {name}; copy the checkpoint again.")
        tensor = torch.empty(size, dtype=stored.properties.dtype)
        try:
            self._files.read_data(LoadPlan(items), _SlicePlanner(tensor))
        except (
            OSError,
            RuntimeError,
            ValueError,
            KeyError,
            EOFError,
            AssertionError,
            pickle.UnpicklingError,
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"Cannot read {name} from {self._folder} ({reason}); copy the checkpoint again."
            ) from error
        return tensor

    def _stored(self, name: str) -> metadata.TensorStorageMetadata:
        if name not in self._tensors:
            raise UserError(f"{self._folder} has no tensor {name}; is this a checkpoint of a Llama-family model?")
        return self._tensors[name]


class _LazyPlanner(SavePlanner):
    """Plans with sizes alone, and makes each block when the writer asks for it."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = {(block.name, block.offset): block for block in blocks}

    def items(self) -> list[WriteItem]:
        return [
            WriteItem(
                index=metadata.MetadataIndex(block.name, torch.Size(block.offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=metadata.ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.size)),
                    properties=metadata.TensorProperties(dtype=block.dtype),
                    size=torch.Size(block.full_size),
                ),
            )
            for block in self._blocks.values()
        ]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([None], buffer)  # Megatron pickles an object as a list of one
            return buffer
        assert write_item.index.offset is not None
        block = self._blocks[write_item.index.fqn, tuple(write_item.index.offset)]
        return block.make().view(block.size)

    # The rest of the interface serves dcp.save, which would wrap our errors in its own.
    def set_up_planner(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], metadata.Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


class _Writer(FileSystemWriter):
    def storage_meta(self) -> metadata.StorageMeta:
        """Leave out the folder's name and the random id, so that equal weights make equal files."""
        return metadata.StorageMeta()


class _SlicePlanner(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: ``tensor`` is a view of the target."""


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """Read ``.metadata``, which is a pickle, without giving it a way to run anything."""
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                description = _MetadataUnpickler(file).load()
        except FileNotFoundError:
            raise UserError(
                f"{self.path} has no .metadata file, so it is not a torch_dist checkpoint; a zarr checkpoint of an "
                "older NeMo must first be saved again with NeMo 2."
            ) from None
        except UserError:
            raise
        except Exception as error:  # a broken pickle can raise anything
            raise UserError(f"{path} is broken ({error}); copy the checkpoint again.") from error
        if not isinstance(description, metadata.Metadata):
            raise UserError(f"{path} does not describe a checkpoint; copy the checkpoint again.")
        return description


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _METADATA_CLASSES[module, name]
        except KeyError:
            raise UserError(
                f"The .metadata of this checkpoint names {module}.{name}, which is no part of a checkpoint's "
                "description and could run code; get the checkpoint from a source that you trust."
            ) from None
