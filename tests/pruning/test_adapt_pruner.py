"""Adapt-Pruner: its recurrence by hand, its golden numbers, and planted layers and units on a real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_pvs.calibration.gradients import layer_taylor_scores
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute, LayerwiseModel
from nemo_pvs.ledger.flops import calibration_flops
from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.methods.adapt_pruner import AdaptPrunerOptions
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.pruning.request import PruneRequest
from nemo_pvs.pruning.structured.adapt_pruner import (
    AdaptPrunerSettings,
    LayerMeasure,
    MeasuredImportance,
    kept_sizes,
    layer_importance,
    next_sparsity,
    plan_adapt_pruner,
)
from tests.calibration.test_engine import token_set
from tests.calibration.test_gradients import element_scores, whole_model_loss
from tests.state_source import StateSource, random_ids, tiny_model
from tests.uneven_model import SIZES, uneven_model

SHAPE = Shape(layers=3, hidden=64, ffn=100, heads=8, kv_groups=4, head_dim=16, vocab=128, tied=True)


def test_golden_numbers() -> None:
    """Of methods.md 18.7: cosines .5, .9 and .95, 50 iterations, amplitude .02."""
    importance = layer_importance(torch.tensor([0.5, 0.9, 0.95]))
    torch.testing.assert_close(importance, torch.tensor([1, -0.411765, -0.588235]).double(), atol=1e-6, rtol=0)
    sparsity = torch.zeros(3).double()
    steps = [sparsity := next_sparsity(sparsity, importance, AdaptPrunerSettings()) for _ in range(3)]
    torch.testing.assert_close(steps[0], torch.tensor([0, 0.028235, 0.031765]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(steps[2], torch.tensor([0, 0.084706, 0.095294]).double(), atol=1e-6, rtol=0)


def test_sparsities_rise_by_the_same_in_all_while_none_is_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    settings = AdaptPrunerSettings(iterations=20, amplitude=0.03)
    sparsity = torch.full((7,), 0.4).double()
    for step in range(1, 5):
        sparsity = next_sparsity(sparsity, layer_importance(torch.rand(7, generator=generator)), settings)
        assert float(sparsity.sum()) == pytest.approx(7 * (0.4 + step / 20))
    assert float(next_sparsity(torch.tensor([0.98]).double(), torch.tensor([-1.0]).double(), settings)) == 0.99


def test_four_steps_by_hand() -> None:
    """T-A1 of methods.md with a layer that cannot lose more than it has: u = 1/10, A = 0.2, I = 1, -1/4, -3/4."""
    importance, settings = torch.tensor([1, -0.25, -0.75]).double(), AdaptPrunerSettings(iterations=10, amplitude=0.2)
    sparsity, steps = torch.tensor([0.15, 0, 0]).double(), []
    for _ in range(4):
        sparsity = next_sparsity(sparsity, importance, settings)
        steps.append(sparsity.tolist())
    expected = [[0.05, 0.15, 0.25], [0, 0.3, 0.5], [0, 0.45, 0.75], [0, 0.6, 0.99]]
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected))


def test_a_layer_that_changes_nothing_matters_least_and_is_pruned_fastest() -> None:
    """T-A2: its cosine is 1."""
    importance = layer_importance(torch.tensor([0.8, 1.0, 0.75, 0.85]))
    assert float(importance[1]) == -1 == float(importance.min())
    assert float(importance.sum()) == pytest.approx(0)
    assert int(next_sparsity(torch.zeros(4).double(), importance, AdaptPrunerSettings()).argmax()) == 1


def test_layers_that_are_all_alike_are_pruned_alike() -> None:
    assert layer_importance(torch.tensor([0.7, 0.7, 0.7])).tolist() == [0, 0, 0]


def test_a_group_goes_when_all_its_channels_are_due() -> None:
    """4 groups of 16: int(64 (1 - s)) is 48 from above s = 15 / 64 on; FFN channels go one by one, none comes back."""
    for share, ffn, groups in ((0.234, 76, 4), (0.235, 76, 3), (0.25, 75, 3), (0.5, 50, 2)):
        [one, *_] = kept_sizes(SHAPE, SHAPE, torch.full((3,), share).double(), AdaptPrunerSettings())
        assert one == LayerSizes(ffn, groups * 2, groups)
    smaller = SHAPE.replace(ffn=60, kv_groups=2)
    assert kept_sizes(SHAPE, smaller, torch.zeros(3), AdaptPrunerSettings())[0] == LayerSizes(60, 4, 2)
    coarse = AdaptPrunerSettings(ffn_multiple=8, kv_groups_multiple=2)
    assert kept_sizes(SHAPE, SHAPE, torch.full((3,), 0.45), coarse)[0] == LayerSizes(100 - 40, 8, 4)


def test_a_layer_pruned_to_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="layer 1 to nothing"):
        kept_sizes(SHAPE.replace(ffn=20), SHAPE.replace(ffn=20), torch.tensor([0.1, 0.99, 0.1]), AdaptPrunerSettings())


def made_up(similarity: list[float]) -> Any:
    """Return measurements by which unit i is worth i."""

    def measure(source: Any, _: int) -> MeasuredImportance:
        shape = shape_of(source)
        sizes = shape.layer_sizes
        return MeasuredImportance(
            torch.tensor(similarity),
            [torch.arange(one.kv_groups).double() for one in sizes],
            [torch.arange(one.ffn).double() for one in sizes],
        )

    return measure


@pytest.mark.parametrize("compat", [False, True])
def test_the_target_is_reached_with_less_than_an_iteration_over(compat: bool) -> None:
    source = StateSource(tiny_model())
    start = shape_of(source)
    wanted = start.parameters - start.body_parameters // 3
    plan = plan_adapt_pruner(source, wanted, made_up([0.5, 0.7, 0.9, 0.9]), AdaptPrunerSettings(compat=compat))
    over = wanted - plan.target.parameters
    assert 0 <= over < 4 * (start.matrix_parameters / 50 + (2 * 4 + 2) * start.head_dim * start.hidden)
    if not compat:  # the smallest unit that went last
        assert over <= (2 * 4 + 2) * start.head_dim * start.hidden
    assert plan.target.uneven
    for layer, (groups, ffn) in enumerate(zip(plan.keep_kv_groups, plan.keep_ffn, strict=True)):
        assert groups[-1] == start.kv_groups - 1
        assert ffn == tuple(range(start.ffn - len(ffn), start.ffn)), layer  # the least important ones went
    assert len(plan.keep_ffn[0]) > len(plan.keep_ffn[1]) > len(plan.keep_ffn[2])


def test_a_second_round_goes_on_from_uneven_layers() -> None:
    source = StateSource(tiny_model())
    start = shape_of(source)
    first = PrunedSource(
        source, plan_adapt_pruner(source, start.parameters - start.body_parameters // 6, made_up([0.5, 0.7, 0.9, 0.9]))
    )
    wanted = shape_of(first).parameters - start.body_parameters // 6
    second = plan_adapt_pruner(first, wanted, made_up([0.9, 0.5, 0.6, 0.7]))
    assert second.parent == shape_of(first)
    assert second.target.parameters <= wanted
    assert shape_of(PrunedSource(first, second)) == second.target


def test_what_cannot_be_reached_is_said() -> None:
    source = StateSource(tiny_model())
    total = shape_of(source).parameters
    with pytest.raises(UserError, match="no more than"):
        plan_adapt_pruner(source, total, made_up([0.5] * 4))
    with pytest.raises(UserError, match=r"nothing|iterations ended"):
        plan_adapt_pruner(source, shape_of(source).vocab, made_up([0.5] * 4))
    with pytest.raises(UserError, match="amplitude"):
        plan_adapt_pruner(source, 1, made_up([0.5] * 4), AdaptPrunerSettings(amplitude=-1))


def test_a_target_is_reached_although_a_full_step_would_empty_a_layer() -> None:
    """Of 32 key channels a sparsity of 0.99, that of a full second step, leaves none; the target needs much less."""
    source = StateSource(tiny_model())
    start = shape_of(source)
    wanted = start.parameters - round(0.6 * start.matrix_parameters)
    settings = AdaptPrunerSettings(iterations=2, amplitude=0)
    target = plan_adapt_pruner(source, wanted, made_up([0.5] * 4), settings).target
    assert wanted - 4 * 3 * start.hidden <= target.parameters <= wanted
    assert target.kv_groups == 1


def test_measurements_of_uneven_layers_are_those_of_the_whole_model() -> None:
    """Cosines by forward hooks, importance by plain autograd, of a model whose layers all differ."""
    model = uneven_model().double()
    tokens = token_set()
    layers, similarity = layer_taylor_scores(
        LayerwiseModel(StateSource(model), compute=Compute(dtype=torch.float64)), tokens
    )
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, inputs, outputs: seen.append(torch.cosine_similarity(inputs[0], outputs, dim=-1).mean().detach())
        )
    whole_model_loss(model, tokens.ids)
    torch.testing.assert_close(similarity, torch.stack(seen), rtol=1e-9, atol=1e-12)
    expected = [torch.zeros(sizes.ffn).double() for sizes in SIZES]
    groups = [torch.zeros(sizes.kv_groups).double() for sizes in SIZES]
    for name, elements in element_scores(model, tokens.ids):
        if not name.endswith("_proj.weight"):
            continue
        layer, kind = int(name.split(".")[2]), name.split(".")[-2]
        scores = elements["param_first"].sum(dim=0 if kind in {"o_proj", "down_proj"} else 1)
        if kind in {"gate_proj", "up_proj", "down_proj"}:
            expected[layer] += scores
        else:
            groups[layer] += scores.unflatten(0, (len(groups[layer]), -1)).sum(dim=1)
    for layer, scores in enumerate(layers):
        torch.testing.assert_close(scores["ffn.param_first"], expected[layer], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(scores["groups.param_first"], groups[layer], rtol=1e-4, atol=1e-9)


def planted() -> Any:
    """Return a model whose layer 2 changes nothing, and whose other layers have useless units 0 to 9 and group 1."""
    model = tiny_model()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            per_group = model.config.num_attention_heads // model.config.num_key_value_heads
            run = per_group * model.config.head_dim
            layer.self_attn.o_proj.weight[:, run : 2 * run] = 0
            layer.mlp.down_proj.weight[:, :10] = 0
            if index == 2:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.slow
def test_the_planted_layer_and_units_go_first() -> None:
    source = StateSource(planted())
    start = shape_of(source)
    drawn: list[int] = []

    def draw(iteration: int) -> TokenSet:
        drawn.append(iteration)
        return TokenSet(random_ids(6, 24, seed=iteration), {})

    measure = LayerMeasure(draw, "param_first", Compute())
    settings = AdaptPrunerSettings(iterations=25, amplitude=0.02)
    plan = plan_adapt_pruner(source, start.parameters - start.body_parameters // 8, measure, settings)
    sizes = plan.target.layer_sizes
    assert min(sizes, key=lambda one: one.ffn) == sizes[2]
    for layer in (0, 1, 3):
        lost = set(range(start.ffn)) - set(plan.keep_ffn[layer])
        assert lost <= set(range(10)) or set(range(10)) < lost
    assert drawn == list(range(len(plan.provenance["sparsities"])))
    assert measure.tokens == len(drawn) * 6 * 24
    dense = calibration_flops(start, 6 * 24, 24, gradients=True)
    assert 0.8 * dense * len(drawn) < measure.flops <= dense * len(drawn)


@pytest.mark.slow
def test_the_method_by_its_name() -> None:
    source = StateSource(tiny_model())
    said: list[str] = []

    class Silent:
        def __enter__(self) -> Any:
            return lambda *_: None

        def __exit__(self, *_: object) -> None:
            pass

    job = PruneRequest(
        source=source,
        options=AdaptPrunerOptions(ratio=0.2, iterations=20),
        tokens=token_set,
        scores=lambda: pytest.fail("it measures by itself"),
        check=lambda shape: None,
        work_folder=None,  # type: ignore[arg-type]
        progress=lambda *_: Silent(),
        say=said.append,
    )
    pruned = method_named("adapt-pruner").prune(job)
    assert shape_of(pruned.source).parameters <= 0.8 * shape_of(source).parameters
    assert pruned.plan is not None
    assert pruned.plan.provenance["calibration"]["tokens"] > 0
    assert "removes" in said[0]
