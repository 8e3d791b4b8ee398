from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from tests.conftest import tiny_llama_config

LLAMA_8B = Shape(
    layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256, tied=False
)  # fmt: skip
DEPTH_4B = LLAMA_8B.replace(layers=16)
WIDTH_4B = LLAMA_8B.replace(hidden=3072, ffn=9216)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 8_030_261_248),
        ({"layers": 16}, 4_540_469_248),
        ({"layers": 8}, 2_795_573_248),
        ({"layers": 4}, 1_923_125_248),
        ({"layers": 2}, 1_486_901_248),
        ({"hidden": 3072, "ffn": 9216}, 4_512_746_496),
        ({"hidden": 2432, "ffn": 6144}, 2_855_364_992),
        ({"hidden": 1792, "ffn": 6016}, 2_081_933_056),
        ({"hidden": 1536, "ffn": 4736}, 1_595_770_368),
        ({"ffn": 6528, "kv_groups": 5}, 4_456_714_240),
        ({"hidden": 3456, "ffn": 7808}, 4_609_699_200),
    ],
)
def test_parameters_of_the_published_models(changes, parameters):
    shape = LLAMA_8B.replace(**changes)
    assert shape.parameters == parameters
    assert shape.body_parameters == parameters - 2 * 128256 * shape.hidden


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 8}, {"head_dim": 8, "intermediate_size": 40}])
def test_parameters_match_transformers(tied, sizes):
    config = tiny_llama_config(tie_word_embeddings=tied, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert Shape.from_config(config.to_dict()).parameters == model.num_parameters()


@pytest.mark.parametrize(("shape", "billions"), [(LLAMA_8B, 45.0), (DEPTH_4B, 24.1), (WIDTH_4B, 24.7)])
def test_training_flops_of_the_published_models(shape, billions):
    assert round(shape.flops_per_token(training=True) / 1e9, 1) == billions


def test_flops_count_every_multiplication():
    shape = Shape(layers=2, hidden=3, ffn=5, heads=4, kv_groups=2, head_dim=2, vocab=7, tied=True)
    query, key = 4 * 2, 2 * 2
    products_in_layer = 3 * query + 2 * 3 * key + query * 3 + 3 * 3 * 5
    forward = 2 * (2 * products_in_layer + 3 * 7)
    assert shape.flops_per_token(training=False) == forward
    assert shape.flops_per_token(training=True) == 3 * forward
    # All scores and all value sums of a sequence of 10, of which a causal mask needs half, per token.
    full = 2 * (10 * 10 * query + 10 * 10 * query) * 2 // 10
    assert shape.flops_per_token(sequence_length=10, training=False) == forward + full // 2


def test_config_round_trip_makes_sizes_explicit():
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "head_dim": None,
        "rope_theta": 5e5,
    }
    shape = Shape.from_config(config)
    assert (shape.kv_groups, shape.head_dim, shape.tied) == (4, 16, False)
    written = shape.to_config(config)
    assert written["head_dim"] == 16
    assert written["rope_theta"] == 5e5
    assert Shape.from_config(written) == shape


def test_query_heads_follow_the_groups():
    assert LLAMA_8B.replace(kv_groups=5).heads == 20
    assert LLAMA_8B.replace(kv_groups=8, heads=16).heads_per_group == 2


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="ffn"):
        LLAMA_8B.replace(ffn=0)
    with pytest.raises(UserError, match="30 query heads"):
        LLAMA_8B.replace(heads=30)
    with pytest.raises(UserError, match="hidden_size"):
        Shape.from_config({"num_hidden_layers": 2, "num_attention_heads": 2})


def test_stages_of_a_pipeline():
    assert LLAMA_8B.stage_layers(4) == [8, 8, 8, 8]
    assert LLAMA_8B.stage_layers(5, last=4) == [7, 7, 7, 7, 4]
    assert LLAMA_8B.stage_layers(4, first=7, last=7) == [7, 9, 9, 7]
    assert LLAMA_8B.stage_layers(2, first=12, last=20) == [12, 20]
    for stages, first, last in ((4, 7, None), (2, 12, 12), (4, 16, 16), (3, 32, None)):
        with pytest.raises(UserError, match=r"in the (first|last), does not divide 32 layers"):
            LLAMA_8B.stage_layers(stages, first, last)
    with pytest.raises(UserError, match="need a pipeline_parallel of 2 or more"):
        LLAMA_8B.stage_layers(1, last=4)
    with pytest.raises(UserError, match="stages of a virtual pipeline are equal"):
        LLAMA_8B.check_parallel(pipeline_parallel=2, virtual_pipeline=2, last_stage_layers=12)


def test_illegal_parallelism_names_the_legal_ones():
    LLAMA_8B.check_parallel(tensor_parallel=8, pipeline_parallel=4)
    with pytest.raises(UserError, match=r"16 does not divide kv_groups=8.* 1, 2, 4, 8\."):
        LLAMA_8B.check_parallel(tensor_parallel=16)
    with pytest.raises(UserError, match=r"5 does not divide 32 layers.* 16, 32; or 5 with last_stage_layers: 4\."):
        LLAMA_8B.check_parallel(pipeline_parallel=5)
    with pytest.raises(UserError, match=r"legal for this model: 1\."):  # the published 4b-flap: 5 groups, ffn 51 * 128
        LLAMA_8B.replace(ffn=6528, kv_groups=5).check_parallel(tensor_parallel=2)


def test_fp8_needs_shards_that_are_multiples_of_16():
    LLAMA_8B.check_parallel(tensor_parallel=8, fp8=True)
    with pytest.raises(UserError, match=r"hidden=3080 is not; choose a multiple of 16 such as 3072\."):
        LLAMA_8B.replace(hidden=3080).check_parallel(fp8=True)
    odd = LLAMA_8B.replace(ffn=9232)  # 577 * 16
    odd.check_parallel(fp8=True)
    odd.check_parallel(tensor_parallel=2)
    with pytest.raises(UserError, match=r"ffn=9232 over 2 ranks is not; choose a multiple of 32 such as 9216\."):
        odd.check_parallel(tensor_parallel=2, fp8=True)
    thin = LLAMA_8B.replace(head_dim=8)
    thin.check_parallel(tensor_parallel=4, fp8=True)
    with pytest.raises(UserError, match=r"kv_groups \* head_dim=64 over 8 ranks is not; choose a multiple of 128"):
        thin.check_parallel(tensor_parallel=8, fp8=True)
    sizes = LLAMA_8B.layer_sizes
    with pytest.raises(UserError, match="ffn=8 is not"):
        LLAMA_8B.with_layers([*sizes[1:], sizes[0]._replace(ffn=8)]).check_parallel(fp8=True)
