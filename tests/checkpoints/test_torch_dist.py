from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from nemo_pvs.checkpoints.files.torch_dist import TensorBlock, TorchDistReader, _MetadataUnpickler, write_torch_dist
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import disk_errors

MATRIX = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
VECTOR = torch.arange(3, dtype=torch.bfloat16)


def write(folder):
    """Store MATRIX in eight unequal chunks, and VECTOR whole."""
    blocks = [
        TensorBlock("m", (5, 6, 7), (i, j, k), tuple(piece.shape), torch.float32, lambda piece=piece: piece)
        for i, rest in ((0, MATRIX[:2]), (2, MATRIX[2:]))
        for j, rest in ((0, rest[:, :1]), (1, rest[:, 1:]))
        for k, piece in ((0, rest[..., :4]), (4, rest[..., 4:]))
    ]
    blocks.append(TensorBlock("v", (3,), (0,), (3,), torch.bfloat16, lambda: VECTOR))
    write_torch_dist(folder, blocks, ["object/shard_0_2"])


@pytest.mark.parametrize(
    ("offset", "size"),
    [((0, 0, 0), (5, 6, 7)), ((3, 0, 0), (1, 6, 7)), ((1, 0, 3), (2, 2, 2)), ((4, 5, 6), (1, 1, 1))],
)
def test_any_slice_can_be_read(tmp_path, offset, size):
    write(tmp_path)
    reader = TorchDistReader(tmp_path)
    expected = MATRIX
    for axis in range(3):
        expected = expected.narrow(axis, offset[axis], size[axis])
    assert torch.equal(reader.read("m", offset, size), expected)
    assert reader.names == ["m", "v"]
    assert (reader.size("m"), reader.dtype("v")) == ((5, 6, 7), torch.bfloat16)


def test_pytorch_reads_what_we_write(tmp_path):
    write(tmp_path)
    state = {"m": torch.empty(5, 6, 7), "v": torch.empty(3, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["m"], MATRIX)
    assert torch.equal(state["v"], VECTOR)


def test_we_read_what_pytorch_writes(tmp_path):
    dcp.save({"model": {"m": MATRIX}, "step": 7}, checkpoint_id=tmp_path, no_dist=True)
    reader = TorchDistReader(tmp_path)
    assert reader.names == ["model.m"]
    assert torch.equal(reader.read("model.m", (1, 0, 0), (2, 6, 7)), MATRIX[1:3])


def test_equal_weights_make_equal_files(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_blocks_are_made_once_and_in_order(tmp_path):
    made = []

    def block(index):
        return TensorBlock("m", (9, 4), (index, 0), (1, 4), torch.float32, lambda: made.append(index) or torch.ones(4))

    write_torch_dist(tmp_path, [block(index) for index in (3, 0, 1, 2, 8, 7, 6, 5, 4)], [])
    assert made == [3, 0, 1, 2, 8, 7, 6, 5, 4]


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_is_named(tmp_path, size):
    (tmp_path / "__0_0.distcp").symlink_to("/dev/full")
    block = TensorBlock("m", (size,), (0,), (size,), torch.float32, lambda: torch.ones(size))
    with pytest.raises(UserError, match="the disk is full"), disk_errors(tmp_path):
        write_torch_dist(tmp_path, [block], [])


class Bomb:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_runs_a_command_does_not_run(tmp_path, protocol):
    write(tmp_path)
    command = f"touch {tmp_path / 'ran'}"
    content = pickle.dumps(Metadata({}, planner_data=Bomb(command)), protocol=protocol)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"names \w+\.system"):
        TorchDistReader(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # the proof that it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["torch", "builtins", "torch.distributed.checkpoint.filesystem"])
def test_no_way_round_through_attributes_of_what_is_allowed(tmp_path, path):
    write(tmp_path)
    name = {"torch": "Size.__class__", "builtins": "eval"}.get(path, "os.system")
    opcodes = b"\x80\x04" + b"".join(bytes([0x8C, len(text)]) + text.encode() for text in (path, name)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(opcodes)
    with pytest.raises(UserError, match="could run code"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps([1, 2])])
def test_a_broken_description_is_refused(tmp_path, content):
    write(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata"):
        TorchDistReader(tmp_path)


def test_a_zarr_checkpoint_is_refused(tmp_path):
    (tmp_path / "module.embedding.word_embeddings.weight").mkdir()
    with pytest.raises(UserError, match="not a torch_dist checkpoint; a zarr checkpoint"):
        TorchDistReader(tmp_path)


def test_broken_data_is_refused(tmp_path):
    write(tmp_path)
    data = tmp_path / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 3])
    with pytest.raises(UserError, match="Cannot read m from"):
        TorchDistReader(tmp_path).read("m", (0, 0, 0), (5, 6, 7))
    data.unlink()
    with pytest.raises(UserError, match="Cannot read v from"):
        TorchDistReader(tmp_path).read("v", (0,), (3,))


def test_a_tensor_with_a_hole_is_refused(tmp_path):
    write_torch_dist(tmp_path, [TensorBlock("m", (4, 3), (0, 0), (2, 3), torch.float32, lambda: torch.ones(2, 3))], [])
    reader = TorchDistReader(tmp_path)
    assert reader.read("m", (0, 0), (2, 3)).sum() == 6
    with pytest.raises(UserError, match="only a part of m"):
        reader.read("m", (1, 0), (2, 3))
    with pytest.raises(UserError, match="no tensor w"):
        reader.read("w", (0,), (1,))


class _AsGetattr:
    """Pickled as ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.call = getattr, (owner, name)

    def __reduce__(self):
        return self.call


def test_enumerations_may_be_pickled_as_python_3_11_2_does(tmp_path):
    """As Debian 12's Python writes every .metadata."""
    (tmp_path / "x").write_bytes(pickle.dumps(_AsGetattr(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST")))
    with open(tmp_path / "x", "rb") as file:
        assert _MetadataUnpickler(file).load() is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST


@pytest.mark.parametrize(("owner", "name"), [(_MEM_FORMAT_ENCODING, "__subclasses__"), (OrderedDict, "fromkeys")])
def test_getattr_yields_nothing_else(owner, name, tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_AsGetattr(owner, name)))
    with pytest.raises(UserError, match=r"names builtins\.getattr, which does not belong"):
        TorchDistReader(tmp_path)
