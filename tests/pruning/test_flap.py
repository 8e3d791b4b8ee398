"""FLAP, Wanda-sp and magnitude-sp: which units they keep, against loops over channels in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.transforms.pad import pad_layers
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.input_means import InputMeans
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.flap import METRICS, plan_flap
from nemo_pvs.pruning.structured.magnitude_sp import plan_magnitude_sp
from nemo_pvs.pruning.structured.units import standardised
from nemo_pvs.pruning.structured.wanda_sp import plan_wanda_sp
from tests.calibration.test_engine import token_set
from tests.state_source import StateSource, as_transformers, random_ids, tiny_model

TINY = Shape(layers=4, hidden=64, ffn=40, heads=12, kv_groups=6, head_dim=8, vocab=128, tied=False)
CHANNELS = {"attention": 12 * 8, "ffn": 40}


def make_scores(seed: int = 0, shape: Shape = TINY, **changes: torch.Tensor) -> Scores:
    """Return random scores of a model of this shape; there are no weights behind them."""
    generator = torch.Generator().manual_seed(seed)
    names = ("energy", "mean", "variance", "fluctuation", "weight_energy", "weight_mean_abs")
    tensors = {
        f"{site}.{name}": torch.rand(shape.layers, shape.axis(axis), generator=generator, dtype=torch.float64) + 0.1
        for site, axis in (("attention", "query"), ("ffn", "ffn"))
        for name in names
    }
    return Scores({**tensors, **changes}, {"model_fingerprint": "f" * 64, "shape": shape.to_dict(), "tokens": {}})


def best(scores: list[float], count: int) -> tuple[int, ...]:
    """Return the indices of the largest, by selection one after the other."""
    left = list(range(len(scores)))
    kept = []
    for _ in range(count):
        kept.append(max(left, key=lambda index: (scores[index], -index)))
        left.remove(kept[-1])
    return tuple(sorted(kept))


def metric_by_hand(scores: Scores, site: str, layer: int, metric: str, variance: str) -> list[float]:
    row = {name: scores.tensors[f"{site}.{name}"][layer].tolist() for name in (variance, *MEASURED)}
    return [
        {
            "IFV": row[variance][channel],
            "WIFV": row[variance][channel] * row["weight_energy"][channel],
            "WIFN": row["weight_mean_abs"][channel] * row["energy"][channel] ** 0.5,
        }[metric]
        for channel in range(CHANNELS[site])
    ]


MEASURED = ("energy", "weight_energy", "weight_mean_abs")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("compat", [False, True])
def test_units_of_each_metric(metric: str, square: bool, compat: bool) -> None:
    scores = make_scores()
    plan = plan_flap(scores, 0.5, metric=metric, structure="UL-UM", square_attention=square, compat=compat)
    for layer in range(4):
        variance = "fluctuation" if compat else "variance"
        attention = metric_by_hand(scores, "attention", layer, metric, variance)
        power = 2 if square else 1
        # 2 heads of 8 channels a group.
        groups = [sum(value**power for value in attention[16 * group : 16 * group + 16]) for group in range(6)]
        assert plan.keep_kv_groups[layer] == best(groups, 3)
        assert plan.keep_ffn[layer] == best(metric_by_hand(scores, "ffn", layer, metric, variance), 20)


def test_layers_are_compared_by_standardised_channels() -> None:
    scores = make_scores(seed=1)
    plan = plan_flap(scores, 0.3, structure="AL-MM", remove_groups=2)
    z_groups, z_ffn = [], []
    for layer in range(4):
        attention = np.array(metric_by_hand(scores, "attention", layer, "WIFV", "variance")) ** 2
        ffn = np.array(metric_by_hand(scores, "ffn", layer, "WIFV", "variance"))
        z_groups += list(((attention - attention.mean()) / attention.std(ddof=1)).reshape(6, 16).mean(axis=1))
        z_ffn += list((ffn - ffn.mean()) / ffn.std(ddof=1))
    kept_groups = [(unit // 6, unit % 6) for unit in best(z_groups, 24 - 8)]
    kept_ffn = [(unit // 40, unit % 40) for unit in best(z_ffn, sum(map(len, plan.keep_ffn)))]
    assert [(layer, group) for layer, row in enumerate(plan.keep_kv_groups) for group in row] == kept_groups
    assert [(layer, channel) for layer, row in enumerate(plan.keep_ffn) for channel in row] == kept_ffn


def test_equal_channels_standardise_to_zero_and_units_of_equal_score_stay_from_the_first() -> None:
    assert standardised(torch.full((2, 5), 3.0).double()).tolist() == [[0.0] * 5] * 2
    same = {f"{site}.variance": torch.ones(4, size).double() for site, size in CHANNELS.items()}
    same |= {f"{site}.weight_energy": torch.ones(4, size).double() for site, size in CHANNELS.items()}
    plan = plan_flap(make_scores(**same), 0.5, structure="UL-UM")
    assert plan.keep_kv_groups == ((0, 1, 2),) * 4
    assert plan.keep_ffn == (tuple(range(20)),) * 4


@pytest.mark.parametrize("structure", ["AL-AM", "AL-MM"])
def test_a_factor_on_a_layer_s_scores_changes_nothing(structure: str) -> None:
    scores = make_scores(seed=2)
    factors = torch.tensor([1.0, 100.0, 1e-4, 7.0])[:, None].double()
    scaled = make_scores(seed=2, **{"ffn.variance": scores.tensors["ffn.variance"] * factors})
    plans = [plan_flap(some, 0.4, structure=structure, bias=False) for some in (scores, scaled)]
    assert plans[0].keep_ffn == plans[1].keep_ffn
    assert plans[0].keep_kv_groups == plans[1].keep_kv_groups


def test_squaring_o_proj_changes_the_published_choice() -> None:
    plans = {plan_flap(make_scores(), 0.3, square_attention=square).keep_kv_groups for square in (True, False)}
    assert len(plans) == 2


def test_wanda_sp_is_wifn_within_layers() -> None:
    scores = make_scores(seed=5)
    plan = plan_wanda_sp(scores, 0.5)
    for layer in range(4):
        attention = metric_by_hand(scores, "attention", layer, "WIFN", "variance")
        assert plan.keep_kv_groups[layer] == best([sum(attention[16 * g : 16 * g + 16]) for g in range(6)], 3)
        assert plan.keep_ffn[layer] == best(metric_by_hand(scores, "ffn", layer, "WIFN", "variance"), 20)
    assert plan.input_means is None


def test_magnitude_sp_is_the_norm_of_columns() -> None:
    model = tiny_model(num_key_value_heads=4)
    source = StateSource(model)
    scores = calibrate(source, token_set(samples=2))
    plan = plan_magnitude_sp(scores, 0.5)
    for layer, module in enumerate(model.model.layers):
        columns = module.mlp.down_proj.weight.detach().double().numpy()
        assert plan.keep_ffn[layer] == best([float(np.linalg.norm(columns[:, j])) for j in range(96)], 48)
        columns = module.self_attn.o_proj.weight.detach().double().numpy()
        groups = [sum(float(np.linalg.norm(columns[:, 32 * g + j])) for j in range(32)) for g in range(4)]
        assert plan.keep_kv_groups[layer] == best(groups, 2)


@pytest.mark.parametrize("structure", ["UL-UM", "AL-AM"])
def test_query_heads_of_each_metric(structure: str) -> None:
    """Each group keeps its best heads, by the mean over their channels; how many depends on the layer in AL-AM."""
    scores = make_scores()
    plan = plan_flap(scores, 0.35, structure=structure, attention_unit="heads", bias=False)
    assert plan.keep_kv_groups == (tuple(range(6)),) * 4
    values = [[v**2 for v in metric_by_hand(scores, "attention", row, "WIFV", "variance")] for row in range(4)]
    for layer, attention in enumerate(values):
        heads = [sum(attention[8 * head : 8 * head + 8]) for head in range(12)]
        kept = plan.target.layer_sizes[layer].heads // 6
        expected = [2 * group + head for group in range(6) for head in best(heads[2 * group : 2 * group + 2], kept)]
        assert list(plan.keep_heads[layer]) == expected
    if structure == "UL-UM":
        assert plan.target.layer_sizes == ((26, 12, 6),) * 4  # 35 % of two heads is none
    else:
        assert {sizes.heads for sizes in plan.target.layer_sizes} == {6, 12}
        unit = 2 * 6 * 8 * 64
        assert abs(plan.provenance["removed_of_matrices"] - 0.35) * TINY.matrix_parameters <= unit / 2
    assert plan.provenance["settings"]["attention_unit"] == "heads"
    assert "attention_unit" not in plan_flap(scores, 0.35).provenance["settings"]
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("make", [plan_flap, plan_wanda_sp, plan_magnitude_sp])
def test_query_heads_go_and_the_rest_is_the_masked_model(make: Callable[..., Plan]) -> None:
    """Half of the heads of every group do nothing, because ``o_proj`` does not read them."""
    model = tiny_model()  # 8 heads in 2 groups
    kept = [tuple(sorted((layer % 4, (layer + 1) % 4, 4, 5 + layer % 3))) for layer in range(4)]
    with torch.no_grad():
        for layer, module in enumerate(model.model.layers):
            silent = [head for head in range(8) if head not in kept[layer]]
            module.self_attn.o_proj.weight.view(64, 8, 16)[:, silent] = 0
    source = StateSource(model)
    plan = make(calibrate(source, token_set(samples=2)), 0.5, structure="UL-UM", attention_unit="heads")
    assert plan.keep_heads == tuple(kept)
    assert plan.target.layer_sizes == ((48, 4, 2),) * 4
    whole = replace(
        plan,
        keep_ffn=(tuple(range(96)),) * 4,
        target=plan.parent.replace(heads=4, features=plan.target.features),
        input_means=plan.input_means and InputMeans.of(plan.input_means.query, [torch.zeros(0) for _ in range(4)]),
    )
    ids = random_ids(2, 30, seed=8).long()
    with torch.no_grad():
        torch.testing.assert_close(
            as_transformers(PrunedSource(source, whole))(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_layers_of_different_query_heads_go_to_nemo_and_back_and_are_padded(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "parent"))
    scores = make_scores(shape=shape_of(source))
    scores = Scores(scores.tensors, {**scores.manifest, "model_fingerprint": fingerprint(source)})
    plan = plan_flap(scores, 0.4, attention_unit="heads")
    assert {sizes.kv_groups for sizes in plan.target.layer_sizes} == {2}
    assert len({sizes.heads for sizes in plan.target.layer_sizes}) > 1
    pruned = PrunedSource(source, plan)
    write_nemo(pruned, tmp_path / "nemo")
    in_nemo = NemoSource(tmp_path / "nemo")
    assert fingerprint(in_nemo) == fingerprint(pruned)
    ids = random_ids(2, 30, seed=8).long()
    with torch.no_grad():
        uneven, even = (as_transformers(it)(ids).logits for it in (in_nemo, pad_layers(in_nemo)))
    torch.testing.assert_close(even, uneven, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", [plan_wanda_sp, plan_magnitude_sp])
def test_scores_that_layers_do_not_share_are_not_compared(plan: Callable[..., Plan]) -> None:
    with pytest.raises(UserError, match="not comparable between layers; choose UL-UM or UL-MM"):
        plan(make_scores(), 0.5, structure="AL-AM")
    assert set(map(len, plan(make_scores(), 0.5, structure="UL-MM").keep_ffn)) == {20}


def test_the_plan_says_what_it_was_made_from_and_what_it_reached() -> None:
    scores = make_scores()
    plan = plan_flap(scores, 0.4)
    assert plan.provenance["scores"] == scores.content_hash
    settings = plan.provenance["settings"]
    assert (settings["metric"], settings["structure"], settings["ratio"], settings["bias"]) == (
        "WIFV",
        "AL-AM",
        0.4,
        True,
    )
    group = (2 * 2 + 2) * 8 * 64
    assert abs(plan.provenance["removed_of_matrices"] - 0.4) * TINY.matrix_parameters < group
    assert plan.target.uneven
    assert not plan_flap(scores, 0.4, uniform=True).target.uneven


def test_means_are_those_of_the_removed_channels() -> None:
    scores = make_scores()
    plan = plan_flap(scores, 0.5)
    assert plan.target.features == ("attention_bias", "mlp_bias")
    for layer in range(4):
        for site, axis in (("attention", "query"), ("ffn", "ffn")):
            kept = plan.kept(axis, layer)
            expected = [
                mean for channel, mean in enumerate(scores.tensors[f"{site}.mean"][layer]) if channel not in kept
            ]
            assert torch.equal(plan.input_means.at(axis, layer), torch.stack(expected).float())


@pytest.mark.parametrize(
    ("settings", "lost", "message"),
    [
        ({"metric": "wifv"}, None, "Unknown metric 'wifv'; choose WIFV, IFV, WIFN"),
        ({"compat": True}, "ffn.fluctuation", r"lack ffn\.fluctuation; calibrate again, on one rank"),
        ({}, "attention.mean", r"lack attention\.mean"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(settings: dict[str, Any], lost: str | None, message: str) -> None:
    scores = make_scores()
    tensors = {name: tensor for name, tensor in scores.tensors.items() if name != lost}
    with pytest.raises(UserError, match=message):
        plan_flap(Scores(tensors, scores.manifest), 0.5, **settings)


@torch.no_grad()
def test_constant_channels_are_made_up_for_exactly() -> None:
    """Keys may go where values are constant: biases give what they gave, added to biases that were there."""
    model = tiny_model(num_key_value_heads=4, attention_bias=True, mlp_bias=True)
    for index, layer in enumerate(model.model.layers):
        constant_groups, constant_channels = [index % 4, (index + 2) % 4], torch.arange(index, 96, 3)
        for group in constant_groups:
            layer.self_attn.v_proj.weight[16 * group : 16 * group + 16] = 0
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[constant_channels] = 0
    source = StateSource(model)
    scores = calibrate(source, token_set())
    plan = plan_flap(scores, 0.3, structure="UL-UM", uniform=True)
    # Channels that do not fluctuate at all are the first to go: 1 of 4 groups and 28 of 32 channels in every layer.
    for layer in range(4):
        assert set(plan.removed("ffn", layer)) <= set(range(layer, 96, 3))
    ids = random_ids(2, 30, seed=8).long()
    dense = model(ids).logits
    pruned = as_transformers(PrunedSource(source, plan))(ids).logits
    torch.testing.assert_close(pruned, dense, rtol=1e-4, atol=1e-4)
    without = as_transformers(PrunedSource(source, plan_flap(scores, 0.3, structure="UL-UM", bias=False)))(ids).logits
    assert (without - dense).abs().max() > 0.1


@torch.no_grad()
def test_the_mean_output_over_the_calibration_tokens_stays() -> None:
    model, tokens = tiny_model(num_key_value_heads=4, std=0.4), token_set()
    source = StateSource(model)
    plan = plan_flap(calibrate(source, tokens), 0.4)
    pruned = PrunedSource(source, plan)
    inputs: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for name, linear in (("self_attn.o_proj", layer.self_attn.o_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            linear.register_forward_pre_hook(
                lambda _, x, key=f"model.layers.{index}.{name}": inputs.update({key: x[0]})
            )
    model(tokens.ids.long())
    for name, x in inputs.items():
        layer, axis = int(name.split(".")[2]), "query" if "o_proj" in name else "ffn"
        kept = list(plan.kept(axis, layer))
        dense = x @ source.read(f"{name}.weight").T
        sliced = x[..., kept] @ pruned.read(f"{name}.weight").T
        bias = pruned.read(f"{name}.bias")
        torch.testing.assert_close((sliced + bias).mean((0, 1)), dense.mean((0, 1)), rtol=1e-5, atol=1e-5)
        if len(kept) < x.shape[-1]:
            assert bias.abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"uniform": True, "ffn_multiple": 16}, {}], ids=["uniform", "uneven"])
def test_the_result_loads_with_its_biases(
    settings: dict[str, Any], make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = HuggingFaceSource(
        make_tiny_llama(tmp_path / "parent", dtype=torch.bfloat16, num_key_value_heads=4, initializer_range=0.2)
    )
    pruned = PrunedSource(source, plan_flap(calibrate(source, token_set()), 0.3, **settings))
    write_huggingface(pruned, tmp_path / "pruned")
    written = HuggingFaceSource(tmp_path / "pruned")
    assert shape_of(written) == shape_of(pruned)
    assert written.config["attention_bias"]
    assert written.config["mlp_bias"]
    assert written.config["architectures"] == ["LlamaForCausalLM" if settings else "PrunedLlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    ids = random_ids(2, 20).long()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, as_transformers(pruned)(ids).logits)
