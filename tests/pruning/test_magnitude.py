"""Magnitude pruning: golden vectors, exact counts, and a source that prunes as it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.sparse.magnitude import MagnitudeSource, magnitude_mask
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from tests.state_source import StateSource, tiny_model

# spec: 16 weights of which three are 0.1 and two 0.05 in size.
GOLDEN = torch.tensor([[0.1, -0.4, 0.3, 0.2, 0.5, -0.05, 0.25, -0.6], [-0.2, 0.1, 0.6, -0.3, 0.05, 0.4, -0.1, 0.2]])


def test_golden_exact_and_compat() -> None:
    exact = magnitude_mask(GOLDEN, Sparsity(0.5))
    assert (~exact).int().tolist() == [[1, 0, 0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1, 1]]
    published = magnitude_mask(GOLDEN, Sparsity(0.5), compat=True)
    assert int((~published).sum()) == 9
    assert torch.equal(~published, GOLDEN.abs() <= 0.25)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.65])
def test_exactly_so_many_of_every_matrix_whatever_the_ties(ratio: float) -> None:
    weight = torch.randn(33, 50, generator=torch.Generator().manual_seed(0)).div(10).bfloat16()
    mask = magnitude_mask(weight, Sparsity(ratio))
    assert int((~mask).sum()) == int(33 * 50 * ratio + 1e-9)
    assert weight[~mask].abs().max() <= weight[mask].abs().min()
    ties = weight.abs() == weight[~mask].abs().max()
    assert mask[ties].tolist() == sorted(mask[ties].tolist())  # those that stay come after those that go


def test_groups_keep_the_two_largest() -> None:
    mask = magnitude_mask(GOLDEN, Sparsity.parse("2:4"))
    assert (~mask).int().tolist() == [[1, 0, 0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0, 1, 0]]


def test_the_source_prunes_matrices_and_passes_on_the_rest() -> None:
    parent = StateSource(tiny_model())
    source = MagnitudeSource(parent, Sparsity(0.5))
    assert parent.reads == []
    assert masks_of(source) is source.masks
    for name, weight in parent.model.state_dict().items():
        pruned = source.read(name)
        if name in source.masks.names:
            mask = source.masks.read(name)
            assert int((~mask).sum()) == weight.numel() // 2
            assert torch.equal(pruned, torch.where(mask, weight, 0.0))
        else:
            assert torch.equal(pruned, weight)
    assert len(source.masks.names) == 4 * 7


def test_nothing_of_the_parent_is_changed() -> None:
    parent = StateSource(tiny_model())
    before = {name: tensor.clone() for name, tensor in parent.model.state_dict().items()}
    source = MagnitudeSource(parent, Sparsity.parse("2:4"))
    for name in before:
        source.read(name)
    for name, tensor in parent.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_writers_stream_it(tmp_path: Path) -> None:
    source = MagnitudeSource(StateSource(tiny_model()), Sparsity(0.5))
    write_huggingface(source, tmp_path / "sparse")
    written = HuggingFaceSource(tmp_path / "sparse")
    for name in source.masks.names:
        assert torch.equal(written.read(name), source.read(name))


def test_a_pattern_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="needs groups of 5 inputs"):
        MagnitudeSource(StateSource(tiny_model()), Sparsity.parse("2:5"))
