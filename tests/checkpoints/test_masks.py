from __future__ import annotations

import pytest
import torch

from nemo_pvs.checkpoints.masks import MaskFile, check_masks, pack, unpack, write_masks
from nemo_pvs.errors import UserError
from tests.masked_source import MaskedSource, RandomMasks
from tests.state_source import StateSource, tiny_model


class GivenMasks:
    def __init__(self, masks: dict[str, torch.Tensor]) -> None:
        self._masks = masks
        self.names = tuple(masks)

    def read(self, name: str) -> torch.Tensor:
        return self._masks[name]


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 77])
def test_packing_keeps_every_bit_in_an_eighth_of_a_byte(columns):
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, (columns + 7) // 8)
    assert torch.equal(unpack(packed, columns), mask)
    first_bits = packed[:, 0] >= 128
    assert torch.equal(first_bits, mask[:, 0])


def test_masks_are_read_back_one_by_one(tmp_path):
    masks = {name: torch.rand(3, columns) < 0.5 for name, columns in (("a.weight", 13), ("b.weight", 16))}
    write_masks(GivenMasks(masks), tmp_path / "masks.safetensors")
    read = MaskFile(tmp_path / "masks.safetensors", {name: tuple(mask.shape) for name, mask in masks.items()})
    assert set(read.names) == set(masks)
    assert all(torch.equal(read.read(name), mask) for name, mask in masks.items())


@pytest.mark.parametrize("sizes", [{}, {"a.weight": (3, 40)}, {"a.weight": (4, 13)}])
def test_masks_of_another_model_are_refused(sizes, tmp_path):
    write_masks(GivenMasks({"a.weight": torch.ones(3, 13, dtype=torch.bool)}), tmp_path / "masks.safetensors")
    with pytest.raises(UserError, match=r"mask of a\.weight"):
        MaskFile(tmp_path / "masks.safetensors", sizes)


def test_masks_that_are_not_those_of_the_weights_are_refused():
    dense = StateSource(tiny_model())
    sparse = MaskedSource(dense)
    check_masks(dense)
    check_masks(sparse)
    sparse.masks = RandomMasks(dense, seed=1)
    with pytest.raises(UserError, match=r"weights of model\.layers\.0\.self_attn\.q_proj\.weight are not zero"):
        check_masks(sparse)
