"""Targets as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.target import (
    choose_target,
    describe_removal,
    parse_sizes,
    read_sizes,
    target_for_ratio,
    with_sizes,
    write_target,
)
from tests.model.test_shape import DEPTH_4B, LLAMA_8B, WIDTH_4B

PARENT = Shape(layers=30, hidden=576, ffn=1536, heads=9, kv_groups=3, head_dim=64, vocab=49152, tied=True)


def test_named_sizes_change_and_query_heads_follow_their_groups() -> None:
    target = with_sizes(PARENT, parse_sizes("hidden=384, ffn=1024,kv_groups=2"))
    assert target == PARENT.replace(hidden=384, ffn=1024, kv_groups=2, heads=6)
    assert with_sizes(PARENT, {"layers": 14}) == PARENT.replace(layers=14)
    assert with_sizes(PARENT, {"hidden": 576}) == PARENT
    assert with_sizes(PARENT, parse_sizes("heads=6")) == PARENT.replace(heads=6)
    assert with_sizes(PARENT, parse_sizes("kv_groups=2,heads=2")) == PARENT.replace(kv_groups=2, heads=2)
    assert with_sizes(LLAMA_8B, {"heads": 24}).heads_per_group == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden=384", r"unknown size 'hiden'; did you mean hidden\?"),
        ("kv_group=2", r"did you mean kv_groups\?"),
        ("xyz=2", "choose among layers, hidden, ffn, kv_groups, heads"),
        ("heads=8", "leaves 8 query heads in 3 KV groups, .* at most 3; choose heads=3 or 6 or 9, or another"),
        ("heads=2", "leaves 2 query heads in 3 KV groups"),
        ("heads=0", "leaves nothing of heads; choose from 1 to 9"),
        ("heads=12", "asks for heads=12, but the model has 9"),
        ("kv_groups=2,heads=3", "leaves 3 query heads in 2 KV groups, .*; choose heads=2 or 4 or 6, or another"),
        ("kv_groups=2,heads=8", "leaves 8 query heads in 2 KV groups, .* at most 3"),
        ("hidden=577", "asks for hidden=577, but the model has 576"),
        ("layers=0", "leaves nothing of layers; choose from 1 to 30"),
        ("ffn=1e3", "needs a whole number for ffn, not '1e3'"),
        ("ffn=-5", "needs a whole number"),
        ("ffn=", "needs a whole number"),
        ("hidden", "'hidden' where size=number is needed"),
        ("hidden=384,", "'' where size=number is needed"),
        ("", "'' where size=number is needed"),
        ("ffn=512,ffn=256", "gives ffn twice"),
    ],
)
def test_mistakes_get_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        with_sizes(PARENT, parse_sizes(text))
    assert "\n" not in str(caught.value)


def test_a_ratio_by_depth_is_the_nearest_number_of_layers() -> None:
    """The paper's depths, by their own share of the body."""
    for ratio, layers in ((0.5, 16), (0.75, 8), (0.875, 4), (0.9375, 2)):
        for method in ("minitron-depth", "shortgpt"):
            assert target_for_ratio(LLAMA_8B, ratio, method) == LLAMA_8B.replace(layers=layers)
    # Of all parameters, 0.435 is what half of the layers is.
    assert target_for_ratio(LLAMA_8B, 0.435, "minitron-depth", "total") == DEPTH_4B


@pytest.mark.parametrize("parent", [LLAMA_8B, PARENT])
@pytest.mark.parametrize("of", ["body", "total"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 1 / 3, 0.5, 0.65, 0.8])
def test_ratios_are_met(parent: Shape, of: str, ratio: float) -> None:
    def share(shape: Shape) -> float:
        count = shape.body_parameters if of == "body" else shape.parameters
        return count / (parent.body_parameters if of == "body" else parent.parameters)

    depth = target_for_ratio(parent, ratio, "minitron-depth", of)
    others = [share(parent.replace(layers=layers)) for layers in range(1, parent.layers)]
    assert abs(share(depth) - (1 - ratio)) == min(abs(other - (1 - ratio)) for other in others)

    width = target_for_ratio(parent, ratio, "minitron-width", of)
    multiple = 128 if parent is LLAMA_8B else 64
    assert width == parent.replace(hidden=width.hidden, ffn=width.ffn)
    assert (width.hidden % multiple, width.ffn % multiple) == (0, 0)
    # Within half a step of ffn, which is at most 2 % of these models.
    step = share(parent) - share(parent.replace(ffn=parent.ffn - multiple))
    assert step < 0.04
    assert abs(share(width) - (1 - ratio)) <= step / 2 + 1e-9
    # In the parent's proportion but for what brings the count near: one step of hidden.
    assert abs(width.ffn - width.hidden * parent.ffn / parent.hidden) <= (parent.ffn / parent.hidden + 2) * multiple


@pytest.mark.parametrize(
    ("ratio", "method", "of", "message"),
    [
        (0.0, "minitron-width", "body", "ratio 0 leaves nothing or removes nothing"),
        (1.0, "minitron-depth", "body", "ratio 1 leaves nothing"),
        (float("nan"), "minitron-depth", "body", "ratio nan"),
        (0.5, "minitron-width", "layers", "share of body or total, not of 'layers'"),
        (0.5, "wanda", "body", "wanda takes no ratio here; minitron-depth, shortgpt, minitron-width do"),
        (0.001, "minitron-width", "body", "No width of this model is close to"),
        (0.99, "minitron-depth", "total", "No depth of this model is close to a ratio of 0.99 of total"),
    ],
)
def test_impossible_ratios_get_one_sentence(ratio: float, method: str, of: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        target_for_ratio(PARENT, ratio, method, of)


def test_both_denominators_are_told() -> None:
    assert describe_removal(LLAMA_8B, DEPTH_4B).startswith("removes 43.5% of all parameters, 50.0% of the body")
    assert describe_removal(LLAMA_8B, WIDTH_4B).startswith("removes 43.8% of all parameters, 46.6% of the body")


def test_one_of_three_ways_is_chosen(tmp_path: Path) -> None:
    assert choose_target(LLAMA_8B, "minitron-width", sizes={"hidden": 3072, "ffn": 9216}) == WIDTH_4B
    assert choose_target(LLAMA_8B, "minitron-depth", ratio=0.5) == DEPTH_4B
    assert choose_target(LLAMA_8B, "minitron-depth", preset="4b-depth") == DEPTH_4B
    write_target(WIDTH_4B, tmp_path / "best.json")
    found = read_sizes(tmp_path / "best.json")
    assert (with_sizes(LLAMA_8B, found.sizes), found.spent) == (WIDTH_4B, None)
    fewer_heads = WIDTH_4B.replace(kv_groups=6, heads=18)
    write_target(fewer_heads, tmp_path / "heads.json")
    assert with_sizes(LLAMA_8B, read_sizes(tmp_path / "heads.json").sizes) == fewer_heads
    with pytest.raises(UserError, match="Nothing says what to prune to; give one of --target"):
        choose_target(LLAMA_8B, "minitron-width")
    with pytest.raises(UserError, match="--target and --ratio say what to prune to"):
        choose_target(LLAMA_8B, "minitron-width", sizes={"ffn": 1}, ratio=0.5)


def test_a_file_of_another_kind_is_no_target(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    for content, message in (([1], "is not a target"), ({"hiden": 3072}, "did you mean hidden")):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            read_sizes(path)
    write_target(WIDTH_4B, path)
    with pytest.raises(UserError, match="asks for layers=32, but the model has 30"):
        with_sizes(PARENT, read_sizes(path).sizes)
