"""LLM-Pruner: which units it keeps, and that what it keeps computes what the masked dense model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.taylor import METRICS
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import LayerSizes
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.llm_pruner import plan_llm_pruner
from nemo_pvs.pruning.structured.unit_counts import STRUCTURES
from nemo_pvs.recipe.target import Target
from tests.calibration.test_engine import token_set
from tests.pruning.test_flap import TINY, best
from tests.state_source import StateSource, as_transformers, random_ids, tiny_model


def make_scores(seed: int = 0) -> Scores:
    """Return random scores of a model of 4 layers, 6 groups and 40 FFN channels; there are no weights behind them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{site}.{metric}": torch.rand(4, size, generator=generator, dtype=torch.float64)
        for site, size in (("groups", 6), ("ffn", 40), ("heads", 12))
        for metric in METRICS
    }
    return Scores(tensors, {"model_fingerprint": "f" * 64, "shape": TINY.to_dict(), "tokens": {}})


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_units_of_every_layer_stay(metric: str) -> None:
    scores = make_scores()
    plan = plan_llm_pruner(scores, 0.3, metric=metric)
    for layer in range(4):
        assert plan.keep_kv_groups[layer] == best(scores.tensors[f"groups.{metric}"][layer].tolist(), 5)
        assert plan.keep_ffn[layer] == best(scores.tensors[f"ffn.{metric}"][layer].tolist(), 28)
    assert plan.input_means is None
    assert plan.provenance["settings"]["metric"] == metric


def test_the_published_setting_of_a_7b_model() -> None:
    """A quarter of layers 4 to 29: 24 of 32 heads and 8256 of 11008 channels there (methods.md, section 10)."""
    shape = TINY.replace(layers=32, heads=32, kv_groups=32, ffn=11008)
    tensors = {"groups.param_first": torch.ones(32, 32).double(), "ffn.param_first": torch.ones(32, 11008).double()}
    scores = Scores(tensors, {"model_fingerprint": "f" * 64, "shape": shape.to_dict(), "tokens": {}})
    plan = plan_llm_pruner(scores, 0.25, protect_first=4, protect_last=2)
    whole, pruned = LayerSizes(11008, 32, 32), LayerSizes(8256, 24, 24)
    assert plan.target.layer_sizes == (whole,) * 4 + (pruned,) * 26 + (whole,) * 2
    assert plan.provenance["removed_of_matrices"] == pytest.approx(0.25 * 26 / 32)


def published_choice(importance: list[float], channels: int, ratio: float, consecutive: int) -> list[int]:
    """Return the units that LLM-Pruner's ``MetaPruner.prune_local`` leaves: its arithmetic, in its order."""
    n_pruned = channels - int(channels * (1 - ratio))
    gone = sorted(range(len(importance)), key=lambda unit: importance[unit])[: n_pruned // consecutive]
    return [unit for unit in range(len(importance)) if unit not in gone]


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.24999, 0.3, 0.33, 0.34, 0.55, 0.6, 0.9])
@pytest.mark.parametrize(("ffn", "groups", "head_dim"), [(100, 8, 128), (107, 5, 64), (40, 6, 8), (11, 1, 80)])
def test_as_many_units_stay_as_in_the_published_code(ratio: float, ffn: int, groups: int, head_dim: int) -> None:
    shape = TINY.replace(ffn=ffn, heads=2 * groups, kv_groups=groups, head_dim=head_dim)
    generator = torch.Generator().manual_seed(ffn)
    tensors = {
        f"{site}.param_first": torch.rand(4, size, generator=generator, dtype=torch.float64)
        for site, size in (("groups", groups), ("ffn", ffn))
    }
    plan = plan_llm_pruner(Scores(tensors, {"model_fingerprint": "f", "shape": shape.to_dict(), "tokens": {}}), ratio)
    for layer in range(4):
        rows = (tensors[f"{site}.param_first"][layer].tolist() for site in ("groups", "ffn"))
        of_groups, of_ffn = rows
        kept = published_choice(of_groups, groups * head_dim, ratio, head_dim) or [of_groups.index(max(of_groups))]
        assert list(plan.keep_kv_groups[layer]) == kept
        assert list(plan.keep_ffn[layer]) == published_choice(of_ffn, ffn, ratio, 1)
    expected = expected_shape(Target(method="llm-pruner", ratio=ratio), shape)
    assert expected.shape == plan.target


@pytest.mark.parametrize(("ffn", "ratio", "kept"), [(11008, 0.25, 8256), (14336, 0.2, 11468), (100, 0.34, 65)])
def test_counts_of_the_published_code(ffn: int, ratio: float, kept: int) -> None:
    target = Target(method="llm-pruner", ratio=ratio)
    assert expected_shape(target, TINY.replace(ffn=ffn)).shape.ffn == kept


@pytest.mark.parametrize("structure", ["UL-MM", "AL-MM", "AL-AM"])
def test_other_structures_reach_the_ratio_of_all_layers_beside_protected_ones(structure: str) -> None:
    plan = plan_llm_pruner(make_scores(), 0.3, structure=structure, protect_first=1, protect_last=1)
    for layer in (0, 3):
        assert plan.target.layer_sizes[layer] == (40, 12, 6)
    group = 2 * 3 * 8 * 64
    assert abs(plan.provenance["removed_of_matrices"] - 0.3) * TINY.matrix_parameters <= group


def test_layers_are_compared_by_the_importance_of_a_weight() -> None:
    scores = make_scores()
    plan = plan_llm_pruner(scores, 0.3, structure="AL-AM")
    units = [
        (float(score) / weights, kind, layer, index)
        for kind, weights in (("groups", (2 * 2 + 2) * 8 * 64), ("ffn", 3 * 64))
        for layer, row in enumerate(scores.tensors[f"{kind}.param_first"])
        for index, score in enumerate(row)
    ]
    kept = {("groups", layer, index) for layer, row in enumerate(plan.keep_kv_groups) for index in row}
    kept |= {("ffn", layer, index) for layer, row in enumerate(plan.keep_ffn) for index in row}
    ranked = sorted(units, reverse=True)[: len(kept)]
    assert {unit[1:] for unit in ranked} == kept
    assert plan.target.uneven


@pytest.mark.parametrize("metric", METRICS)
def test_query_heads_by_their_own_importance(metric: str) -> None:
    scores = make_scores()
    plan = plan_llm_pruner(scores, 0.5, metric=metric, attention_unit="heads", protect_first=1)
    assert plan.target.layer_sizes == (LayerSizes(40, 12, 6), *((LayerSizes(20, 6, 6),) * 3))
    for layer in range(1, 4):
        heads = scores.tensors[f"heads.{metric}"][layer].tolist()
        assert list(plan.keep_heads[layer]) == [2 * g + best(heads[2 * g : 2 * g + 2], 1)[0] for g in range(6)]
    expected = expected_shape(
        Target(method="llm-pruner", ratio=0.5, attention_unit="heads", protect_first=1, metric=metric), TINY
    )
    assert (expected.shape, expected.exact) == (plan.target, True)


def test_query_heads_are_compared_with_neurons_by_the_importance_of_a_weight() -> None:
    """A unit is the best, or the second best, head of all six groups: 6 * 2 * 8 * 64 weights."""
    random = make_scores()
    # A weight of a head is about as important as one of a neuron, or no head would stay but the best.
    heads = random.tensors["heads.param_first"] * (2 * 8 * 64) / (3 * 64)
    scores = Scores({**random.tensors, "heads.param_first": heads}, random.manifest)
    plan = plan_llm_pruner(scores, 0.3, structure="AL-AM", attention_unit="heads")
    units = [
        (float(score) / (3 * 64), layer)
        for layer, row in enumerate(scores.tensors["ffn.param_first"])
        for score in row
    ]
    kept = sum(map(len, plan.keep_ffn))
    second = heads.view(4, 6, 2).min(dim=2).values.sum(dim=1)
    kept_second = [layer for layer in range(4) if len(plan.keep_heads[layer]) == 12]
    units += [(float(score) / (6 * 2 * 8 * 64), f"second of {layer}") for layer, score in enumerate(second)]
    ranked = sorted(units, key=lambda unit: -unit[0])[: kept + len(kept_second)]
    assert 0 < len(kept_second) < 4
    assert {unit for _, unit in ranked if isinstance(unit, str)} == {f"second of {layer}" for layer in kept_second}


@torch.no_grad()
def test_useless_heads_go_and_the_loss_stays() -> None:
    model = tiny_model()  # 8 heads in 2 groups
    useless = [[layer % 4, 4 + (layer + 1) % 4] for layer in range(4)]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.view(64, 8, 16)[:, useless[index]] = 0
        layer.mlp.down_proj.weight[:, ::4] = 0
    source = StateSource(model)
    plan = plan_llm_pruner(calibrate(source, token_set(), gradients=True), 0.25, attention_unit="heads")
    for layer in range(4):
        assert set(range(8)) - set(plan.keep_heads[layer]) == set(useless[layer])
        assert set(range(96)) - set(plan.keep_ffn[layer]) == set(range(0, 96, 4))
    ids = random_ids(2, 30, seed=8).long()
    torch.testing.assert_close(
        as_transformers(PrunedSource(source, plan))(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_uniform_layers_are_a_plain_llama() -> None:
    assert not plan_llm_pruner(make_scores(), 0.3, structure="AL-AM", uniform=True).target.uneven


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("metric", METRICS)
@torch.no_grad()
def test_useless_units_are_the_ones_that_go_and_the_loss_stays(metric: str, structure: str) -> None:
    """Half of all groups and channels do nothing: their outputs meet zeros (T-L4)."""
    model = tiny_model(num_key_value_heads=4)
    groups = [[index % 4, (index + 1) % 4] for index in range(4)]
    channels = [list(range(index % 2, 96, 2)) for index in range(4)]
    for index, layer in enumerate(model.model.layers):
        for group in groups[index]:
            layer.self_attn.o_proj.weight[:, 32 * group : 32 * group + 32] = 0
        layer.mlp.down_proj.weight[:, channels[index]] = 0
    source = StateSource(model)
    plan = plan_llm_pruner(calibrate(source, token_set(), gradients=True), 0.5, metric=metric, structure=structure)
    for layer in range(4):
        assert set(range(4)) - set(plan.keep_kv_groups[layer]) == set(groups[layer])
        assert set(range(96)) - set(plan.keep_ffn[layer]) == set(channels[layer])
    ids = random_ids(2, 30, seed=8).long()
    torch.testing.assert_close(
        as_transformers(PrunedSource(source, plan))(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_slicing_is_masking() -> None:
    model = tiny_model(num_key_value_heads=4)
    source = StateSource(model)
    scores = calibrate(source, token_set(), gradients=True)
    plan = plan_llm_pruner(scores, 0.4, structure="AL-AM", protect_first=1)
    ids = random_ids(2, 30, seed=8).long()
    pruned = as_transformers(PrunedSource(source, plan))(ids).logits
    dense = model(ids).logits
    mask(model, plan)
    torch.testing.assert_close(pruned, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert (pruned - dense).abs().max() > 0.1


def mask(model: Any, plan: Plan) -> None:
    for index, layer in enumerate(model.model.layers):
        for linear, axis in ((layer.self_attn.o_proj, "query"), (layer.mlp.down_proj, "ffn")):
            linear.weight[:, list(plan.removed(axis, index))] = 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "WIFV"}, "Unknown metric 'WIFV'; choose param_first, param_second, param_mix, vectorize"),
        ({"protect_first": 2, "protect_last": 2}, "Cannot protect 4 of 4 layers; some must be left to prune"),
        ({"protect_first": -1}, "Cannot protect -1 of 4 layers"),
        ({"protect_first": 1, "uniform": True}, "not all can be uniform; leave out one of the two"),
        ({"protect_first": 3, "structure": "AL-AM"}, r"0\.5 cannot be removed from 1 of 4 layers; choose a lower one"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_llm_pruner(make_scores(), 0.5, **settings)
    assert "\n" not in str(caught.value)


def test_scores_without_gradients_are_refused() -> None:
    scores = calibrate(StateSource(tiny_model()), token_set())
    with pytest.raises(UserError, match="without gradients; measure them again with pvs calibrate --gradients"):
        plan_llm_pruner(scores, 0.3)
