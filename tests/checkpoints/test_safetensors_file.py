from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemo_pvs.checkpoints.files.safetensors_file import SafetensorsReader, SafetensorsWriter
from nemo_pvs.errors import UserError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "c": torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0)).half(),
    "d": torch.tensor([[0.1]], dtype=torch.float64),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    return path


def test_reads_what_the_library_writes(file):
    reader = SafetensorsReader(file)
    assert sorted(reader.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert reader.dtype(name) == tensor.dtype
        assert reader.size(name) == tuple(tensor.shape)
        assert torch.equal(reader.read(name), tensor)


def test_the_library_reads_what_we_write(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x", [*TENSORS, "never written"])
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.finish()
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert writer.bytes_written == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_view_is_written_in_row_major_order(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x", "t")
    writer.write("t", TENSORS["a"].T[1:])
    writer.finish()
    assert torch.equal(SafetensorsReader(tmp_path / "x").read("t"), TENSORS["a"].T[1:])


def test_room_for_the_header_suffices_for_long_names_and_many_tensors(tmp_path):
    names = [f'module."ö".{"x" * 300}.{index}' for index in range(50)]
    writer = SafetensorsWriter(tmp_path / "x", names)
    for index, name in enumerate(names):
        writer.write(name, torch.full((1, 1, 1, 1, 2), float(index), dtype=torch.bfloat16))
    writer.finish()
    assert [load_file(tmp_path / "x")[name].max().item() for name in names] == list(range(50))


def test_a_tensor_that_was_read_can_be_changed_without_harm(file):
    reader = SafetensorsReader(file)
    reader.read("a").zero_()
    assert torch.equal(reader.read("a"), TENSORS["a"])


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_refused(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"x\.safetensors is not a complete safetensors file"):
        SafetensorsReader(file)


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x02" + bytes(7) + b"[]", b"\x05" + bytes(7) + b"hello"])
def test_a_file_of_another_kind_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        SafetensorsReader(file)


def test_a_header_that_contradicts_itself_is_refused(file):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(UserError, match="12 bytes, which is not its shape"):
        SafetensorsReader(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="missing"):
        SafetensorsReader(tmp_path / "x.safetensors")


def test_quantised_tensors_are_refused(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "x")
    with pytest.raises(UserError, match="stored as I8"):
        SafetensorsReader(tmp_path / "x").read("a")
