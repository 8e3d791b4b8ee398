from __future__ import annotations

import torch

from nemo_pvs.checkpoints.huggingface.folder import write_huggingface
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from tests.conftest import tiny_llama_config
from tests.state_source import StateSource, tiny_model

MASKED = "model.layers.1.mlp.down_proj.weight"
UNMASKED = "model.layers.0.self_attn.q_proj.weight"


class OneMask:
    def __init__(self, mask: torch.Tensor) -> None:
        self.names = (MASKED,)
        self.mask = mask

    def read(self, name: str) -> torch.Tensor:
        return self.mask


def make_source() -> StateSource:
    """Return a model with one 2:4 matrix that has a mask, and one matrix whose first row is zero without one."""
    model = tiny_model()
    state = model.state_dict()
    mask = torch.ones_like(state[MASKED], dtype=torch.bool).unflatten(1, (-1, 4))
    mask[..., 1] = mask[..., 2] = False
    state[MASKED].mul_(mask.flatten(1))
    state[UNMASKED][0] = 0
    source = StateSource(model)
    source.masks = OneMask(mask.flatten(1))
    return source


def test_zeros_masks_and_patterns_are_counted():
    found = {matrix.name: matrix for matrix in matrix_sparsity(make_source())}
    assert len(found) == 7 * tiny_llama_config().num_hidden_layers
    masked, bare = found[MASKED], found[UNMASKED]
    assert (masked.zeros, masked.masked, masked.disagreements) == (masked.weights // 2, masked.weights // 2, 0)
    assert masked.pattern == "2:4"
    assert (bare.zeros, bare.masked, bare.pattern) == (tiny_llama_config().hidden_size, None, "")


def test_a_pruned_weight_that_came_back_is_a_disagreement():
    source = make_source()
    source.masks.mask[0, 0] = False
    assert next(m for m in matrix_sparsity(source) if m.name == MASKED).disagreements == 1


def test_masks_travel_through_both_formats(tmp_path):
    source = make_source()
    write_nemo(source, tmp_path / "nemo")
    write_huggingface(open_source(tmp_path / "nemo"), tmp_path / "hf")
    for folder in ("nemo", "hf"):
        masks = masks_of(open_source(tmp_path / folder))
        assert masks.names == (MASKED,)
        assert torch.equal(masks.read(MASKED), source.masks.mask)
