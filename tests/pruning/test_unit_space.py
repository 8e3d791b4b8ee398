"""Units as one vector: which weights belong to them, in whole tensors and in shards, and that masked is pruned."""

from __future__ import annotations

import pytest
import torch

from nemo_pvs.model.layout import Layout
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.unit_space import UnitSpace
from tests.state_source import StateSource, as_transformers, random_ids, tiny_model


def some_kept(space: UnitSpace, seed: int = 0) -> torch.Tensor:
    """Return random units to keep, something in every layer."""
    kept = torch.rand(space.size, generator=torch.Generator().manual_seed(seed)) < 0.7
    space.groups(kept)[:, 0] = True
    kept[-1] = True
    return kept


def space_of(source: StateSource) -> UnitSpace:
    return UnitSpace(Layout.for_config(source.config).shape(source.config))


def masked(source: StateSource, space: UnitSpace, kept: torch.Tensor) -> None:
    """Set every weight of removed units to zero, by the units of Megatron's tensors."""
    state = source.model.state_dict()
    with torch.no_grad():
        for entry in Layout.for_config(source.config).entries(space.shape):
            rows, columns = (kept[units] for units in space.of_tensor(entry))
            mask = rows[:, None] & columns
            parts = entry.split(mask.view(entry.size(space.shape)), space.shape)
            for part, own in zip(entry.parts, parts, strict=True):
                state[part.name] *= own


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}])
def test_masked_weights_with_norms_over_kept_channels_compute_what_the_pruned_model_computes(overrides) -> None:
    """T-E2 of methods.md."""
    model = tiny_model(**overrides)
    source = StateSource(model)
    space = space_of(source)
    kept = some_kept(space)
    plan = space.plan(kept, "efficient-llm", {})
    assert plan.target.parameters < space.shape.parameters
    pruned = as_transformers(PrunedSource(source, plan))
    masked(source, space, kept)
    share = int(space.hidden(kept).sum()) / space.shape.hidden
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight.data *= share**0.5
            module.variance_epsilon *= share
    ids = random_ids(2, 16).long()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, pruned(ids).logits, atol=1e-5)


def test_shards_are_cut_before_parts_are_fused() -> None:
    source = StateSource(tiny_model(attention_bias=True))
    space = space_of(source)
    shape = space.shape
    local = shape.replace(kv_groups=shape.kv_groups // 2)
    kept = some_kept(space)
    for entry in Layout.for_config(source.config).entries(shape):
        whole = entry.split(kept[space.of_tensor(entry)[0]], shape)
        columns = space.of_tensor(entry)[1]
        for rank in range(2):
            rows, own_columns = space.of_tensor(entry, rank=rank, ranks=2)
            for full, own in zip(whole, entry.split(kept[rows], local), strict=True):
                expected = full.chunk(2)[rank] if entry.tensor_parallel_axis == 0 else full
                assert torch.equal(own, expected), entry.megatron
            assert torch.equal(own_columns, columns.chunk(2)[rank] if entry.tensor_parallel_axis == 1 else columns)


def test_views_share_the_vector_and_cover_it() -> None:
    space = space_of(StateSource(tiny_model()))
    vector = torch.zeros(space.size)
    for part in (space.hidden, space.groups, space.ffn):
        part(vector).add_(1)
    assert vector.tolist() == [1.0] * (space.size - 1) + [0.0]
    assert space.kept_shape(space.everything()) == space.shape
