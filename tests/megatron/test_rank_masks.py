"""A rank's share of the masks: which bits it holds, and what they do to a tensor."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.megatron.masks import rank_masks as rank_masks
from nemo_pvs.megatron.masks.rank_masks import PackedMask, RankMasks
from tests.masked_source import MaskedSource, RandomMasks
from tests.state_source import StateSource, tiny_model
from tests.uneven_model import uneven_model


@pytest.mark.parametrize("weights", [1, 8, 64, 65, 1001])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_pruned_values_become_zero_and_others_keep_every_bit(weights, chunk, monkeypatch):
    monkeypatch.setattr(rank_masks, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(weights)
    kept = torch.rand(weights, generator=generator) < 0.5
    values = torch.randn(weights, generator=generator)
    mask = PackedMask(kept)
    assert mask.bits.numel() == (weights + 7) // 8, "more than a bit a weight"
    assert mask.broken(values) == int((~kept).sum())
    zeroed = values.clone()
    mask.zero_pruned(zeroed)
    assert torch.equal(zeroed, torch.where(kept, values, 0.0))
    assert mask.broken(zeroed) == mask.broken(zeroed.bfloat16()) == 0


def test_what_is_not_finite_or_negative_becomes_plus_zero():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, -0.0])
    mask = PackedMask(torch.zeros(5, dtype=torch.bool))
    mask.zero_pruned(values)
    assert torch.equal(values.view(torch.int32), torch.zeros(5, dtype=torch.int32))
    assert mask.broken(torch.full((5,), -0.0)) == 0, "a negative zero is a zero"


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="6 weights does not fit 8"):
        PackedMask(torch.ones(2, 3, dtype=torch.bool)).zero_pruned(torch.ones(8))


def _source(*, uneven: bool) -> MaskedSource:
    dense = StateSource(uneven_model() if uneven else tiny_model())
    return MaskedSource(dense, RandomMasks(dense, dense=("model.layers.1.self_attn.k_proj.weight",)))


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_holds_the_rows_and_columns_that_megatron_gives_it(uneven, ranks):
    """Row by row by the rules of Megatron's fused tensors, for every rank."""
    source = _source(uneven=uneven)
    shape = shape_of(source)
    h = shape.head_dim
    for rank in range(ranks):
        found = RankMasks(source, rank=rank, ranks=ranks)
        assert len(found.entries) == 4 * shape.layers
        for (layer, name), entry in found.entries.items():
            local = found.read(entry)
            whole = {part.name.split(".")[-2]: _mask(source, part.name) for part in entry.parts}
            sizes = shape.at(layer)
            groups, per_group, ffn = sizes.kv_groups // ranks, sizes.heads_per_group, sizes.ffn // ranks
            if "linear_qkv" in name:
                rows = []
                for group in range(rank * groups, (rank + 1) * groups):
                    rows += [whole["q_proj"][head * h : head * h + h] for head in _range(group, per_group)]
                    rows += [whole[kind][group * h : group * h + h] for kind in ("k_proj", "v_proj")]
                expected = torch.cat(rows)
            elif "linear_fc1" in name:
                expected = torch.cat([whole[kind][_slice(rank, ffn)] for kind in ("gate_proj", "up_proj")])
            elif "linear_fc2" in name:
                expected = whole["down_proj"][:, _slice(rank, ffn)]
            else:
                expected = whole["o_proj"][:, _slice(rank, groups * per_group * h)]
            assert torch.equal(local, expected), f"{name} of layer {layer}"


def _mask(source: MaskedSource, name: str) -> torch.Tensor:
    return source.masks.masks.get(name, torch.ones_like(source.read(name)).bool())


def _range(group: int, per_group: int) -> range:
    return range(group * per_group, (group + 1) * per_group)


def _slice(rank: int, width: int) -> slice:
    return slice(rank * width, (rank + 1) * width)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.input_layernorm.weight"])
def test_masks_outside_the_matrices_of_decoder_layers_are_refused(name):
    source = _source(uneven=False)
    source.masks.names = (*source.masks.names, name)
    with pytest.raises(UserError, match=f"{name} has a mask"):
        RankMasks(source)
