"""Plans: what they hold, how they look on disk, and what they refuse."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.input_means import AXES, FEATURES, InputMeans
from nemo_pvs.pruning.plan import Plan, format_ranges, parse_ranges, whole_layers

PARENT = Shape(layers=4, hidden=64, ffn=96, heads=8, kv_groups=4, head_dim=16, vocab=128, tied=False)
LAYOUT = Layout.for_config({"architectures": ["LlamaForCausalLM"]})


def make_plan(parent: Shape = PARENT, seed: int = 0, **sizes: int) -> Plan:
    """Return a plan that keeps random units."""
    choose = random.Random(seed)
    target = parent.replace(**{"layers": 3, "hidden": 40, "ffn": 50, "kv_groups": 2, **sizes})

    def keep(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(choose.sample(range(size), count)))

    keep_layers, keep_hidden = keep(parent.layers, target.layers), keep(parent.hidden, target.hidden)
    keep_ffn = tuple(keep(parent.ffn, target.ffn) for _ in range(target.layers))
    keep_kv_groups = tuple(keep(parent.kv_groups, target.kv_groups) for _ in range(target.layers))
    keep_heads = []
    if target.heads_per_group < parent.heads_per_group:
        for groups in keep_kv_groups:
            heads: list[int] = []
            for group in groups:
                chosen = keep(parent.heads_per_group, target.heads_per_group)
                heads += [group * parent.heads_per_group + head for head in chosen]
            keep_heads.append(tuple(heads))
    return Plan(
        method="random",
        parent=parent,
        target=target,
        keep_layers=keep_layers,
        keep_hidden=keep_hidden,
        keep_ffn=keep_ffn,
        keep_kv_groups=keep_kv_groups,
        keep_heads=tuple(keep_heads),
        provenance={"settings": {"seed": seed}},
    )


MERGING = replace(
    make_plan(heads=2),
    keep_kv_groups=((0, 1),) * 3,
    keep_heads=((0, 3),) * 3,
    merged_heads=(((0, 1), (3, 2)), ((3, 2),), ()),
)


def with_means(plan: Plan, seed: int = 0, scale: float = 1.0) -> Plan:
    """Return the plan with random means of what it removes."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [
            scale * torch.randn(len(plan.removed(axis, layer)), generator=generator)
            for layer in range(len(plan.keep_ffn))
        ]
        for axis in AXES
    ]
    features = tuple(sorted({*plan.target.features, *FEATURES}))
    return replace(plan, target=plan.target.replace(features=features), input_means=InputMeans.of(*rows))


def test_ranges_by_hand() -> None:
    assert format_ranges((0, 1, 2, 3, 5, 7, 8, 9)) == "0-3,5,7-9"
    assert format_ranges((4,)) == "4"
    assert parse_ranges("0-3,5,7-9") == (0, 1, 2, 3, 5, 7, 8, 9)


@pytest.mark.slow
@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_round_trip(indices: set[int]) -> None:
    ordered = tuple(sorted(indices))
    text = format_ranges(ordered)
    assert parse_ranges(text) == ordered
    # As short as can be: neighbouring ranges never touch.
    pieces = [parse_ranges(piece) for piece in text.split(",")]
    assert all(after[0] - before[-1] > 1 for before, after in pairwise(pieces))


@pytest.mark.parametrize("plan", [make_plan(), make_plan(heads=2), MERGING], ids=["groups", "heads", "merged"])
def test_round_trip_on_disk(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.plan_hash == plan.plan_hash
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_changing_one_layer_changes_one_line(tmp_path: Path) -> None:
    plan = make_plan()
    ffn = list(plan.keep_ffn)
    ffn[1] = tuple(range(plan.target.ffn))
    other = replace(plan, keep_ffn=tuple(ffn))
    plan.save(tmp_path / "one.json")
    other.save(tmp_path / "other.json")
    lines = [(tmp_path / name).read_text().splitlines() for name in ("one.json", "other.json")]
    changed = [after for before, after in zip(*lines, strict=True) if before != after]
    assert [line.strip() for line in changed] == [f'"{plan.keep_layers[1]}": "0-49",']


def test_the_hash_follows_every_field() -> None:
    plan = make_plan()
    others = [
        make_plan(seed=1),
        replace(plan, method="other"),
        replace(plan, provenance={}),
        replace(plan, keep_hidden=tuple(range(40))),
        make_plan(heads=2),
        replace(make_plan(heads=2), keep_kv_groups=((0, 1),) * 3, keep_heads=((0, 2),) * 3),
        replace(make_plan(heads=2), keep_kv_groups=((0, 1),) * 3, keep_heads=((0, 3),) * 3),
        MERGING,
        replace(MERGING, merged_heads=(((0, 1), (3, 2)), (), ())),
    ]
    assert len({plan.plan_hash, make_plan().plan_hash, *(other.plan_hash for other in others)}) == 10


@given(
    layers=st.integers(1, 4),
    hidden=st.integers(1, 64),
    ffn=st.integers(1, 96),
    kv_groups=st.integers(1, 4),
    heads_per_group=st.integers(1, 2),
    tied=st.booleans(),
)
def test_kept_tensors_add_up_to_the_target(
    layers: int, hidden: int, ffn: int, kv_groups: int, heads_per_group: int, tied: bool
) -> None:
    sizes = {"layers": layers, "hidden": hidden, "ffn": ffn, "kv_groups": kv_groups}
    plan = make_plan(replace(PARENT, tied=tied), **sizes, heads=kv_groups * heads_per_group)
    assert plan.kept_parameters(LAYOUT) == plan.target.parameters


def test_llama_31_minitron_width_counts() -> None:
    """Llama-3.1-8B to hidden 3072, ffn 9216: 4,512,746,496 parameters (Llama-3.1-Minitron-4B-Width's shape)."""
    parent = Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256, tied=False)
    plan = Plan(
        method="prefix",
        parent=parent,
        target=parent.replace(hidden=3072, ffn=9216),
        keep_layers=tuple(range(32)),
        keep_hidden=tuple(range(3072)),
        keep_ffn=(tuple(range(9216)),) * 32,
        keep_kv_groups=(tuple(range(8)),) * 32,
    )
    assert plan.kept_parameters(LAYOUT) == 4_512_746_496


def test_query_heads_follow_their_group() -> None:
    plan = Plan(
        method="by hand",
        parent=PARENT,
        target=PARENT.replace(layers=1, kv_groups=2),
        keep_layers=(2,),
        keep_hidden=tuple(range(64)),
        keep_ffn=(tuple(range(96)),),
        keep_kv_groups=((1, 3),),
    )
    # 2 heads of 16 channels a group: group 1 has query channels 32-63 and key channels 16-31.
    assert format_ranges(plan.kept("query", 0)) == "32-63,96-127"
    assert format_ranges(plan.kept("key", 0)) == "16-31,48-63"
    assert plan.kept("vocab", None) == tuple(range(128))


def test_query_heads_within_their_groups() -> None:
    plan = Plan(
        method="by hand",
        parent=PARENT,
        target=PARENT.replace(layers=1, kv_groups=2, heads=2),
        keep_layers=(2,),
        keep_hidden=tuple(range(64)),
        keep_ffn=(tuple(range(96)),),
        keep_kv_groups=((1, 3),),
        keep_heads=((3, 6),),
    )
    assert format_ranges(plan.kept("query", 0)) == "48-63,96-111"
    assert format_ranges(plan.kept("key", 0)) == "16-31,48-63"
    assert plan.to_json()["keep_heads"] == {"2": "3,6"}


def test_whole_layers_keep_everything_in_them() -> None:
    plan = Plan("depth", PARENT, PARENT.replace(layers=2), **whole_layers(PARENT, [0, 3]))
    assert plan.kept_parameters(LAYOUT) == PARENT.replace(layers=2).parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_hidden": tuple(range(39))}, "keeps .*hidden 39.* target is .*hidden 40"),
        (
            {"keep_hidden": (*range(39), 64)},
            "keep_hidden must be ascending, without duplicates, not empty, and within 0-63",
        ),
        ({"keep_hidden": (-1, *range(39))}, "within 0-63"),
        ({"keep_hidden": (0, 0, *range(1, 39))}, "without duplicates"),
        ({"keep_layers": (2, 1, 0)}, "keep_layers must be ascending"),
        ({"keep_ffn": (tuple(range(50)),) * 2}, "keep_ffn has 2 layers, but 3 are kept"),
        ({"keep_ffn": (tuple(range(50)), tuple(range(49)), tuple(range(50)))}, "ffn 49 to 50"),
        ({"keep_kv_groups": ((0, 4),) * 3}, "keep_kv_groups of layer 0 must be"),
        ({"target": replace(PARENT, layers=3, vocab=100)}, "leaves head_dim"),
        ({"target": PARENT.replace(layers=3, kv_groups=2, heads=2)}, "2 heads in 2 KV groups"),
        ({"keep_heads": ((0, 1, 2, 3),) * 2}, "keep_heads has 2 layers, but 3 are kept"),
        ({"keep_heads": ((0, 1, 2, 8),) * 3}, "keep_heads of layer 0 must be ascending, .* within 0-7"),
        ({"keep_heads": ((0, 1, 2),) * 3, "keep_kv_groups": ((0, 1),) * 3}, "the same number of heads"),
        ({"keep_heads": ((0, 4),) * 3, "keep_kv_groups": ((0, 1),) * 3}, "layer 0 .* none for the others"),
        (
            {"keep_heads": ((0, 2),) * 3, "keep_kv_groups": ((0, 1),) * 3},
            "keeps .*2 heads in 2 .* target is .*4 heads",
        ),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    plan = replace(make_plan(), keep_layers=(0, 2, 3))
    with pytest.raises(UserError, match=message) as caught:
        replace(plan, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((1, 0),), "a kept and a removed head of one group"),
        (((0, 3),), "a kept and a removed head of one group"),
        (((0, 2),), "a kept and a removed head of one group"),
        (((0, -1),), "a kept and a removed head of one group"),
        (((0, 1), (0, 1)), "must not name a head twice"),
    ],
)
def test_heads_that_cannot_be_merged_are_refused(pairs: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(MERGING, merged_heads=(pairs, (), ()))
    with pytest.raises(UserError, match="merged_heads has 1 layers, but 3 are kept"):
        replace(MERGING, merged_heads=((),))


@pytest.mark.parametrize(
    "change",
    [
        {"keep_layers": None},
        {"keep_hidden": "0-3;5"},
        {"keep_hidden": ""},
        {"keep_hidden": 7},
        {"keep_ffn": ["0-49"] * 3},
        {"keep_ffn": {"0": "0-49"}},
        {"parent": {"layers": 4}},
        {"target": {"layers": 4, "colour": 1}},
        {"provenance": None},
        {"keep_heads": "0-3"},
        {"keep_heads": {"0": "0-3"}},
        {"merged_heads": {"0": "0:1"}},
        {"merged_heads": {"0": "0-1", "1": "", "2": ""}},
    ],
)
def test_a_malformed_plan_is_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**make_plan().to_json(), **change}))
    with pytest.raises(UserError) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


def test_a_plan_that_lacks_a_field_is_refused() -> None:
    for name in make_plan().to_json():
        values = make_plan().to_json()
        del values[name]
        with pytest.raises(UserError, match="not a plan of nemo_pvs"):
            Plan.from_json(values)
    values = make_plan(heads=2).to_json()
    del values["keep_heads"]
    with pytest.raises(UserError, match=r"its target is .*2 heads in 2 KV groups"):
        Plan.from_json(values)
    with pytest.raises(UserError, match="not a plan of nemo_pvs"):
        Plan.from_json([])  # type: ignore[arg-type]


def test_removed_is_what_is_not_kept() -> None:
    plan = make_plan()
    for axis in ("query", "key", "ffn"):
        kept, removed = plan.kept(axis, 1), plan.removed(axis, 1)
        assert sorted((*kept, *removed)) == list(range(PARENT.axis(axis)))


def test_means_travel_beside_the_plan(tmp_path: Path) -> None:
    plan = with_means(make_plan())
    plan.save(tmp_path / "plan.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.input_means", "plan.json"]
    assert len((tmp_path / "plan.json").read_text()) < 3000
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.plan_hash == plan.plan_hash
    for axis in AXES:
        for layer in range(3):
            assert torch.equal(loaded.input_means.at(axis, layer), plan.input_means.at(axis, layer))


def test_the_hash_follows_every_mean() -> None:
    plan = with_means(make_plan())
    rows = {axis: [plan.input_means.at(axis, layer) for layer in range(3)] for axis in AXES}
    rows["ffn"][2] = rows["ffn"][2].clone()
    rows["ffn"][2][-1] += 1e-6
    other = replace(plan, input_means=InputMeans.of(rows["query"], rows["ffn"]))
    assert other != plan
    assert other.plan_hash != plan.plan_hash
    assert with_means(make_plan()) == plan
    assert plan.plan_hash != make_plan().plan_hash


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_means_that_are_not_the_plan_s_are_refused(damage: str, tmp_path: Path) -> None:
    with_means(make_plan()).save(tmp_path / "plan.json")
    vectors = tmp_path / "plan.input_means"
    if damage == "missing":
        vectors.unlink()
    elif damage == "cut":
        vectors.write_bytes(vectors.read_bytes()[:-5])
    else:
        with_means(make_plan(), seed=1).input_means.save(vectors)
    with pytest.raises(UserError, match=r"plan\.input_means, which belongs to the plan next to it") as caught:
        Plan.load(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


def test_means_must_fit_what_is_removed() -> None:
    plan = with_means(make_plan())
    with pytest.raises(UserError, match=r"do not fit the channels that it removes \(query\)"):
        replace(plan, input_means=with_means(make_plan(kv_groups=3)).input_means)
    with pytest.raises(UserError, match="its target is"):
        replace(plan, target=make_plan().target)
    with pytest.raises(UserError, match="do not have the hash that it records"):
        Plan.from_json(plan.to_json())
