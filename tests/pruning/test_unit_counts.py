"""Counts of units against hand-computed budgets, exhaustive oracles, and what must hold for any scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.pruning.structured.unit_counts import STRUCTURES, UnitRules, unit_counts

LLAMA_8B = Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256, tied=False)
TINY = Shape(layers=5, hidden=64, ffn=90, heads=12, kv_groups=6, head_dim=8, vocab=128, tied=False)
NEURON, GROUP = 3 * 64, (2 * 2 + 2) * 8 * 64
"""Weights of a neuron and of a KV group of TINY: rows of gate and up, a column of down; 2 q, k, v, 2 o heads."""


def random_scores(shape: Shape, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.rand(shape.layers, size, generator=generator, dtype=torch.float64)
        for size in (shape.kv_groups, shape.ffn)
    )


def removed_weights(shape: Shape, groups: list[int], ffn: list[int]) -> int:
    kept = shape.with_layers(
        LayerSizes(neurons, count * shape.heads_per_group, count) for count, neurons in zip(groups, ffn, strict=True)
    )
    return shape.matrix_parameters - kept.matrix_parameters


@pytest.mark.parametrize(
    ("compat", "multiple", "kept"), [(True, 1, 6486), (True, 128, 6528), (False, 1, 6742), (False, 128, 6784)]
)
def test_llama_31_flap_of_the_paper(compat: bool, multiple: int, kept: int) -> None:
    """UL-MM at 0.5 with 3 of 8 groups removed: 20 heads in 5 groups and, by the published script, ffn 6528."""
    rules = UnitRules(0.5, "UL-MM", remove_groups=3, ffn_multiple=multiple, compat=compat)
    counts = unit_counts(torch.zeros(32, 8), torch.zeros(32, 14336), LLAMA_8B, rules)
    assert counts == ([5] * 32, [kept] * 32)


def test_with_the_paper_s_counts_the_model_has_the_paper_s_size() -> None:
    target = LLAMA_8B.replace(kv_groups=5, ffn=6528)
    assert (target.heads, target.parameters) == (20, 4_456_714_240)


HEADS_OF_GROUPS = 2 * 6 * 8 * 64
"""Weights of one query head of each of TINY's 6 KV groups."""


def random_unit_scores(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores of TINY's units with four heads a group."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.rand(5, 4, generator=generator, dtype=torch.float64).sort(descending=True).values
    return heads, torch.rand(5, 90, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_query_heads_as_units_reach_the_ratio_of_all_weights(structure: str, ratio: float) -> None:
    """Keys and values count among the weights, but stay; counts are heads of each group."""
    shape = TINY.replace(heads=24)
    rules = UnitRules(ratio, structure, attention_unit="heads")
    heads, ffn = unit_counts(*random_unit_scores(), shape, rules)
    kept = shape.with_layers(LayerSizes(neurons, 6 * count, 6) for count, neurons in zip(heads, ffn, strict=True))
    assert [rules.sizes(shape, *counts) for counts in zip(heads, ffn, strict=True)] == [*kept.layer_sizes]
    removed = shape.matrix_parameters - kept.matrix_parameters
    if structure == "UL-UM":
        assert (heads, ffn) == ([4 - int(ratio * 4)] * 5, [90 - int(ratio * 90)] * 5)
    else:
        slack = HEADS_OF_GROUPS / 2 if structure == "AL-AM" else 5 * NEURON
        assert abs(removed - ratio * shape.matrix_parameters) <= slack
    assert all(1 <= count <= 4 for count in heads)


def test_heads_and_neurons_compete_by_score_alone() -> None:
    """AL-AM by a loop: the best units together, as many as come nearest to the weight that stays."""
    shape = TINY.replace(heads=24)
    heads, ffn = random_unit_scores(seed=3)
    found = unit_counts(heads, ffn, shape, UnitRules(0.4, "AL-AM", attention_unit="heads"))
    ranked = sorted(
        [(float(score), HEADS_OF_GROUPS, 0, layer) for layer in range(5) for score in heads[layer][1:]]
        + [(float(score), NEURON, 1, layer) for layer in range(5) for score in ffn[layer].sort().values[:-1]],
        reverse=True,
    )
    # The best unit of each kind and layer always stays, and so do keys and values.
    weight, wanted = 5 * (2 * HEADS_OF_GROUPS + NEURON), 0.6 * shape.matrix_parameters
    counts = [[1] * 5, [1] * 5]
    for _, size, kind, layer in ranked:
        if abs(weight + size - wanted) >= abs(weight - wanted):
            break
        weight += size
        counts[kind][layer] += 1
    assert found == (counts[0], counts[1])


@pytest.mark.parametrize(
    ("changes", "heads", "message"),
    [
        ({}, 6, "has only one query head; choose attention_unit groups"),
        ({"remove_groups": 1, "structure": "UL-MM"}, 12, "keeps all KV groups; leave remove_groups and"),
        ({"kv_groups_multiple": 2}, 12, "leave remove_groups and kv_groups_multiple out"),
        ({"compat": True}, 12, "leave compat out, or attention_unit"),
        ({"attention_unit": "head"}, 12, "Unknown attention_unit 'head'; choose groups, heads"),
        ({"ratio": 0.95, "structure": "UL-MM"}, 12, "heads of each KV group removed per layer, no FFN channels"),
        ({"ratio": 0.95, "structure": "AL-AM"}, 12, "choose a lower one"),
    ],
)
def test_query_heads_that_cannot_be_units_are_refused(changes: dict[str, Any], heads: int, message: str) -> None:
    rules = UnitRules(**{"ratio": 0.3, "attention_unit": "heads", **changes})
    with pytest.raises(UserError, match=message):
        unit_counts(torch.zeros(5, heads // 6), torch.zeros(5, 90), TINY.replace(heads=heads), rules)


@pytest.mark.parametrize(("compat", "removed"), [(False, [0, 427]), (True, [0, 171])])
def test_a_group_weighs_427_neurons_or_170_by_the_published_script(compat: bool, removed: list[int]) -> None:
    """Two units compete: ``groups`` goes first when it is worst. Its weight shows in how many neurons stay."""
    shape = LLAMA_8B.replace(layers=1, kv_groups=2)
    weight = 170 if compat else 2560 / 6
    neurons = torch.arange(1.0, 14337.0)[None]
    ratio = weight / (2 * weight + 14336)  # exactly one group's weight goes
    worst_first, worst_last = torch.tensor([[0.0, 2e5]]), torch.tensor([[1e5, 2e5]])
    lost = []
    for groups in (worst_first, worst_last):
        kept_groups, kept_ffn = unit_counts(groups, neurons, shape, UnitRules(ratio, "AL-AM", compat=compat))
        lost.append((2 - kept_groups[0], 14336 - kept_ffn[0]))
    # compat keeps strictly more than its threshold: one unit less.
    assert lost == [(1, removed[0] + compat), (0, removed[1])]


@pytest.mark.parametrize("ratio", [0.05, 0.29, 0.5, 0.83])
def test_ul_um_keeps_exact_counts(ratio: float) -> None:
    groups, ffn = unit_counts(*random_scores(TINY), TINY, UnitRules(ratio, "UL-UM"))
    assert groups == [6 - int(6 * ratio)] * 5
    assert ffn == [90 - int(90 * ratio)] * 5


def test_the_rounding_guard() -> None:
    """0.29 * 100 is 28.999... in floating point."""
    shape = TINY.replace(ffn=100)
    assert unit_counts(*random_scores(shape), shape, UnitRules(0.29, "UL-UM"))[1] == [71] * 5


@pytest.mark.parametrize("structure", ["UL-MM", "AL-MM", "AL-AM"])
@pytest.mark.parametrize("ratio", [0.11, 0.2, 0.5, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_ratio_is_met_within_a_unit(structure: str, ratio: float, seed: int) -> None:
    counts = unit_counts(*random_scores(TINY, seed), TINY, UnitRules(ratio, structure))
    error = removed_weights(TINY, *counts) - ratio * TINY.matrix_parameters
    # UL removes whole neurons of all layers at once, the others single units.
    unit = {"UL-MM": 5 * NEURON, "AL-MM": NEURON, "AL-AM": GROUP}[structure]
    assert abs(error) < unit


def test_al_am_is_the_best_cut_of_the_ranking() -> None:
    """Brute force: of all cuts of the one list of units the one whose weight is nearest, groups and neurons apart."""
    groups, ffn = random_scores(TINY, seed=3)
    kept = unit_counts(groups, ffn, TINY, UnitRules(0.35, "AL-AM"))
    units = [(score, GROUP, "g", layer) for layer, row in enumerate(groups.tolist()) for score in row]
    units += [(score, NEURON, "f", layer) for layer, row in enumerate(ffn.tolist()) for score in row]
    units.sort(key=lambda unit: -unit[0])
    wanted = 0.65 * sum(weight for _, weight, _, _ in units)
    cut = min(range(1, len(units)), key=lambda count: abs(sum(unit[1] for unit in units[:count]) - wanted))
    for kind, counts in zip("gf", kept, strict=True):
        assert counts == [sum(unit[2:] == (kind, layer) for unit in units[:cut]) for layer in range(5)]


def test_al_mm_compares_layers_but_not_kinds() -> None:
    groups, ffn = random_scores(TINY, seed=4)
    rules = UnitRules(0.4, "AL-MM", remove_groups=2)
    kept = unit_counts(groups, ffn, TINY, rules)
    neurons = int((0.4 * TINY.matrix_parameters - 5 * 2 * GROUP) / NEURON)
    for scores, counts, removed in zip((groups, ffn), kept, (10, neurons), strict=True):
        threshold = scores.flatten().sort().values[removed]
        assert counts == (scores >= threshold).sum(dim=1).tolist()
    assert unit_counts(groups, 100 * ffn, TINY, rules) == kept


@pytest.mark.parametrize("structure", ["AL-MM", "AL-AM"])
def test_no_layer_loses_all_of_a_kind(structure: str) -> None:
    groups, ffn = random_scores(TINY)
    groups[2] -= 10
    ffn[3] -= 10
    kept_groups, kept_ffn = unit_counts(groups, ffn, TINY, UnitRules(0.5, structure))
    assert kept_groups[2] == 1
    assert kept_ffn[3] == 1
    error = removed_weights(TINY, kept_groups, kept_ffn) - 0.5 * TINY.matrix_parameters
    assert abs(error) < GROUP


@given(
    structure=st.sampled_from(STRUCTURES),
    ratio=st.floats(0.02, 0.7),
    ffn_multiple=st.sampled_from([1, 4, 16, 90]),
    kv_groups_multiple=st.sampled_from([1, 2, 3]),
    uniform=st.booleans(),
    compat=st.booleans(),
    seed=st.integers(0, 9),
)
def test_counts_are_multiples_within_bounds(
    structure: str, ratio: float, ffn_multiple: int, kv_groups_multiple: int, uniform: bool, compat: bool, seed: int
) -> None:
    rules = UnitRules(
        ratio,
        structure,
        uniform=uniform,
        ffn_multiple=ffn_multiple,
        kv_groups_multiple=kv_groups_multiple,
        compat=compat,
    )
    try:
        groups, ffn = unit_counts(*random_scores(TINY, seed), TINY, rules)
    except UserError:  # what a layer must keep is more than the ratio leaves
        assert structure in {"AL-MM", "AL-AM"}
        least = ffn_multiple * NEURON
        if structure == "AL-AM":
            left = (1 - ratio) * TINY.matrix_parameters - 5 * kv_groups_multiple * GROUP
        else:  # the groups have their own number, and neurons must bear the rest
            removed_groups = min(int(ratio * 30), 5 * (6 - kv_groups_multiple))
            left = (1 - ratio) * TINY.matrix_parameters - (30 - removed_groups) * GROUP
        assert left < 5 * least + GROUP or compat
        return
    assert all(count % kv_groups_multiple == 0 and 1 <= count <= 6 for count in groups)
    assert all(count % ffn_multiple == 0 and 1 <= count <= 90 for count in ffn)
    if uniform or structure.startswith("UL"):
        assert len(set(groups)) == len(set(ffn)) == 1


@pytest.mark.parametrize("structure", ["UL-MM", "AL-MM", "AL-AM"])
@pytest.mark.parametrize("uniform", [False, True])
def test_neurons_make_up_for_rounded_groups(structure: str, uniform: bool) -> None:
    rules = UnitRules(0.3, structure, uniform=uniform, kv_groups_multiple=2, ffn_multiple=2)
    counts = unit_counts(*random_scores(TINY), TINY, rules)
    error = removed_weights(TINY, *counts) - 0.3 * TINY.matrix_parameters
    # Half a multiple of each layer where all must be alike, else half a multiple in all, and the unit before it.
    assert abs(error) <= (5 * 2 * NEURON if uniform or structure == "UL-MM" else 2 * NEURON + GROUP)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (UnitRules(0.0), "ratio 0.0 removes nothing or everything"),
        (UnitRules(1.0), "ratio 1.0"),
        (UnitRules(0.5, "AL"), "Unknown structure 'AL'; choose UL-UM, UL-MM, AL-MM, AL-AM"),
        (UnitRules(0.5, "UL-MM", remove_groups=6), "Cannot remove 6 of 6 KV groups; choose from 0 to 5"),
        (UnitRules(0.5, "AL-AM", remove_groups=1), "AL-AM chooses the number of KV groups itself"),
        (UnitRules(0.5, ffn_multiple=128), "ffn_multiple is 128, but the model has 90"),
        (UnitRules(0.5, kv_groups_multiple=0), "kv_groups_multiple is 0"),
        (UnitRules(0.05, "UL-MM", remove_groups=3), "more than all FFN channels would remain"),
        (UnitRules(0.95, "UL-MM", remove_groups=0), "no FFN channels would remain"),
        (UnitRules(0.99, "AL-AM"), "leaves every layer less than the smallest possible size"),
    ],
)
def test_rules_without_sense_are_refused(rules: UnitRules, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        unit_counts(*random_scores(TINY), TINY, rules)
    assert "\n" not in str(caught.value)
