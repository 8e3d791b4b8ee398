"""Which shapes a search looks at."""

from __future__ import annotations

import re

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.search.grid import Grid, SizeLimit, flops_at, inference_bytes, legal_shapes
from tests.model.test_shape import LLAMA_8B, WIDTH_4B


def test_modelopts_grid_for_an_8b() -> None:
    grid = Grid.of(LLAMA_8B)
    assert grid.layers == (26, 28, 30, 32)
    assert grid.hidden == (2560, 2816, 3072, 3328, 3584, 3840, 4096)
    assert grid.ffn == tuple(range(8704, 14337, 512))
    assert grid.kv_groups == (8,)


def test_steps_are_the_users_and_the_parents_own_size_is_a_choice() -> None:
    parent = LLAMA_8B.replace(hidden=4000)
    grid = Grid.of(parent, layers_step=0, hidden_step=1500, ffn_step=0, kv_groups_step=2, max_width_pruning=0.5)
    assert grid == Grid(layers=(32,), hidden=(3000, 4000), ffn=(14336,), kv_groups=(4, 6, 8))
    with pytest.raises(UserError, match="steps of 0 or more"):
        Grid.of(LLAMA_8B, layers_step=-1)
    with pytest.raises(UserError, match="steps of 0 or more"):
        Grid.of(LLAMA_8B, heads_step=-8)
    with pytest.raises(UserError, match="from 0 to below 1"):
        Grid.of(LLAMA_8B, max_width_pruning=1.0)


def test_query_heads_that_the_groups_share_equally() -> None:
    grid = Grid.of(LLAMA_8B, heads_step=8, kv_groups_step=2)
    assert (grid.kv_groups, grid.heads) == ((6, 8), (24, 32))
    assert [grid.heads_in(groups, LLAMA_8B) for groups in (6, 8)] == [(24,), (24, 32)]
    assert Grid.of(LLAMA_8B, heads_step=4).heads_in(8, LLAMA_8B) == (24, 32)
    assert Grid.of(LLAMA_8B).heads_in(6, LLAMA_8B) == (24,)
    for heads_step in (5, 32):
        with pytest.raises(
            UserError, match=f"step of {heads_step} in query heads gives no number .* at most 40%; cho"
        ):
            Grid.of(LLAMA_8B, heads_step=heads_step)


def test_by_brute_force_over_every_size() -> None:
    """A small model, and every combination of its sizes tried one by one."""
    parent = Shape(layers=4, hidden=32, ffn=48, heads=6, kv_groups=2, head_dim=8, vocab=64, tied=False)
    settings = {"layers_step": 1, "hidden_step": 8, "ffn_step": 6, "kv_groups_step": 1, "heads_step": 1}
    grid = Grid.of(parent, **settings, max_width_pruning=0.9, max_depth_pruning=0.9)
    wanted = set()
    for layers in range(1, 5):
        for hidden in (8, 16, 24, 32):
            for ffn in (6, 12, 18, 24, 30, 36, 42, 48):
                for groups in (1, 2):
                    for heads in range(groups, 3 * groups + 1, groups):
                        count = 2 * 64 * hidden + hidden
                        count += layers * (hidden * 8 * 2 * (heads + groups) + 3 * hidden * ffn + 2 * hidden)
                        if 13300 <= count <= 14700 and groups == 2 and layers % 2 == 0:
                            wanted.add((layers, hidden, ffn, groups, heads))
    found = legal_shapes(parent, grid, SizeLimit(parameters=14000), tensor_parallel=2, pipeline_parallel=2)
    assert {(one.layers, one.hidden, one.ffn, one.kv_groups, one.heads) for one in found} == wanted
    assert {heads for *_, heads in wanted} == {2, 4, 6}
    assert len(found) == len(set(found))


def test_the_published_width_is_among_the_legal_shapes_of_its_budget() -> None:
    shapes = legal_shapes(LLAMA_8B, Grid.of(LLAMA_8B), SizeLimit(parameters=4.5e9), tensor_parallel=8, fp8=True)
    assert WIDTH_4B in shapes
    assert LLAMA_8B not in shapes
    for shape in shapes:
        shape.check_parallel(tensor_parallel=8, fp8=True)
        assert abs(shape.parameters - 4.5e9) <= 0.05 * 4.5e9


def test_memory_is_weights_and_kv_cache() -> None:
    """Llama-3.1-8B: 16.06 GB in bf16, and 128 KiB of keys and values a token (32 layers x 8 groups x 128 x 2 x 2)."""
    assert inference_bytes(LLAMA_8B, context=1) - 2 * 8_030_261_248 == 131072
    assert inference_bytes(LLAMA_8B, 4096, 3) - 2 * 8_030_261_248 == 3 * 4096 * 131072
    budget = SizeLimit(memory_bytes=12e9, context=32768, batch_size=1)
    shapes = legal_shapes(LLAMA_8B, Grid.of(LLAMA_8B), budget)
    for shape in shapes:
        cache = 2 * 2 * 32768 * shape.layers * 8 * 128
        assert abs(2 * shape.parameters + cache - 12e9) <= 0.05 * 12e9
    longer = legal_shapes(LLAMA_8B, Grid.of(LLAMA_8B), SizeLimit(memory_bytes=12e9, context=1))
    assert min(shape.parameters for shape in longer) > min(shape.parameters for shape in shapes)


def test_a_bound_of_flops_per_token_leaves_the_cheaper_shapes() -> None:
    grid, budget = Grid.of(LLAMA_8B), SizeLimit(parameters=6e9)
    every = legal_shapes(LLAMA_8B, grid, budget)
    flops = flops_at(4096)
    assert flops(LLAMA_8B) == LLAMA_8B.flops_per_token(sequence_length=4096, training=False)
    bound = sorted(map(flops, every))[len(every) // 2]
    fast = legal_shapes(LLAMA_8B, grid, SizeLimit(parameters=6e9, flops_per_token=bound))
    assert fast == [shape for shape in every if flops(shape) <= bound]
    least = min(map(flops, every))
    with pytest.raises(UserError, match=re.escape(f"at most 1e+09 FLOPs per token; the least is {least:g}.")):
        legal_shapes(LLAMA_8B, grid, SizeLimit(parameters=6e9, flops_per_token=1e9))


def test_nothing_to_choose_from_gets_one_sentence() -> None:
    grid = Grid.of(LLAMA_8B)
    with pytest.raises(
        UserError, match=r"No shape .* reaches from 3\.\d+e\+09 to 7\.8\d+e\+09 parameters; allow more"
    ):
        legal_shapes(LLAMA_8B, grid, SizeLimit(parameters=1e9))
    with pytest.raises(UserError, match=r"reaches from .* bytes"):
        legal_shapes(LLAMA_8B, grid, SizeLimit(memory_bytes=1e9))
    with pytest.raises(UserError, match="holds the parent alone"):
        legal_shapes(LLAMA_8B, Grid((32,), (4096,), (14336,), (8,)), SizeLimit(parameters=8e9))
    with pytest.raises(UserError, match="can be split by tensor parallelism 16 and pipeline parallelism 1 in FP8"):
        legal_shapes(LLAMA_8B, grid, SizeLimit(parameters=4.5e9), tensor_parallel=16, fp8=True)
    with pytest.raises(UserError, match="needs numbers above 0"):
        SizeLimit(parameters=-1)
    sizes = LLAMA_8B.layer_sizes
    uneven = LLAMA_8B.with_layers([*sizes[1:], sizes[0]._replace(ffn=8192)])
    with pytest.raises(UserError, match="layers are alike"):
        legal_shapes(uneven, grid, SizeLimit(parameters=4e9))
