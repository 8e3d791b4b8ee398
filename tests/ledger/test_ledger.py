from __future__ import annotations

import random
from pathlib import Path
from typing import get_args

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Activity, Charge, Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.files import read_json, write_json

# The paper's parent (Llama-3.1-8B) and its two targets of half the size.
PARENT = Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256, tied=False)
DEPTH = PARENT.replace(layers=16)
WIDTH = PARENT.replace(hidden=3072, ffn=9216)
BILLION = 10**9


def _trained(shape: Shape, tokens: int) -> Ledger:
    ledger = Ledger()
    ledger.charge("training", tokens, shape, 0, training=True)
    return ledger


def test_an_8b_model_costs_45_gflop_a_training_token() -> None:
    # By hand: a layer has 4096 * 128 * 2 * 40 + 3 * 4096 * 14336 = 218,103,808 weights in matrices.
    by_hand = 6 * (32 * 218_103_808 + 128_256 * 4096)
    assert _trained(PARENT, 1).total.flops == by_hand
    assert by_hand / 1e9 == pytest.approx(45.0, abs=0.05)
    assert _trained(PARENT, 7 * BILLION).training == (7 * BILLION, by_hand * 7 * BILLION)


@pytest.mark.parametrize(
    ("shape", "ratio", "tokens_at_equal_flops"), [(DEPTH, 1.70, 424 * BILLION), (WIDTH, 1.66, 414 * BILLION)]
)
def test_equal_total_tokens_are_not_equal_total_flops(shape: Shape, ratio: float, tokens_at_equal_flops: int) -> None:
    pruned = Ledger()
    pruned.inherit(_trained(PARENT, 200 * BILLION))
    pruned.charge("training", 50 * BILLION, shape, 0, training=True)
    scratch = _trained(shape, 250 * BILLION)
    assert pruned.total.tokens == scratch.total.tokens
    assert pruned.total.flops is not None
    assert scratch.total.flops is not None
    assert pruned.total.flops / scratch.total.flops == pytest.approx(ratio, abs=0.005)
    equal = pruned.total.flops / shape.flops_per_token(training=True)
    assert equal == pytest.approx(tokens_at_equal_flops, rel=0.002)


def test_every_pass_is_charged_at_its_own_rate() -> None:
    ledger = Ledger()
    ledger.charge("calibration", 1000, PARENT, 2048, training=False, note="wikitext")
    forward = 2 * (32 * 218_103_808 + 128_256 * 4096) + 2 * 32 * 2048 * 4096
    assert ledger.charges == [Charge("calibration", 1000, 1000 * forward, "wikitext")]
    ledger.charge("training", 1000, PARENT, 2048, training=True)
    assert ledger.training == (1000, 3 * 1000 * forward)
    assert ledger.total == (2000, 4 * 1000 * forward)


def test_what_was_read_is_inherited_and_comes_back_from_disk(tmp_path: Path) -> None:
    read = TokensRead("a" * 64, seed=1, sequence_length=32, first=64, end=128)
    parent, child = _trained(DEPTH, 300), Ledger()
    parent.charge("training", 64, DEPTH, 32, training=True, read=read)
    child.inherit(parent)
    child.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json").read == [read]
    assert [list(charge).count("read") for charge in child.to_json()] == [0, 1], "ledgers of old stay as they were"


def test_inherited_training_is_the_parents_and_evaluation_never_counts() -> None:
    parent = _trained(DEPTH, 300)
    parent.charge("search", 20, DEPTH, 0, training=False)
    parent.charge("evaluation", 999, DEPTH, 0, training=False)
    child = Ledger()
    child.inherit(parent)
    child.charge("training", 5, DEPTH, 0, training=True)
    child.charge("evaluation", 999, DEPTH, 0, training=False)
    assert [charge.activity for charge in child.charges] == ["parent pretraining", "search", "training", "evaluation"]
    assert child.training.tokens == 5
    assert child.total.tokens == 325
    rate = DEPTH.flops_per_token(training=True)
    assert child.total.flops == 305 * rate + 20 * rate // 3
    grandchild = Ledger()
    grandchild.inherit(child)
    assert grandchild.training == (0, 0)
    assert grandchild.total == child.total


def test_an_unknown_cost_makes_the_total_unknown_and_not_zero() -> None:
    ledger = _trained(DEPTH, 10)
    ledger.charge("parent pretraining", None, PARENT, 0, training=True, note="not published")
    assert ledger.charges[-1].flops is None
    assert ledger.training.tokens == 10
    assert ledger.total == (None, None)


def test_a_saved_ledger_is_the_same_ledger(tmp_path: Path) -> None:
    ledger = _trained(PARENT, 15_000 * BILLION)  # more FLOPs than a double or an int64 can count
    ledger.charge("parent pretraining", None, PARENT, 0, training=True, note="Größe")
    assert ledger.training.flops is not None
    assert ledger.training.flops > 2**63
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == ledger


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"activity": "training", "tokens": 1}], "not a ledger of nemo_pvs"),
        (
            [{"activity": "holiday", "tokens": 1, "flops": 1}],
            "charges 'holiday', but known activities are parent pretraining",
        ),
        ([1], "not a ledger of nemo_pvs"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path / "ledger.json", content)
    with pytest.raises(UserError, match=message):
        Ledger.load(tmp_path / "ledger.json")


def test_zeros_are_counted_dense_and_beside_it_skipped() -> None:
    masked = PARENT.matrix_parameters // 2
    ledger = Ledger()
    ledger.charge("mask learning", 10, PARENT, 0, training=False, masked_parameters=masked)
    ledger.charge("training", 100, PARENT, 0, training=True, masked_parameters=masked)
    dense = 2 * (PARENT.matrix_parameters + PARENT.vocab * PARENT.hidden)
    sparse = 2 * (masked + PARENT.vocab * PARENT.hidden)  # by hand: what is left of the matrices, and the head
    assert ledger.training == (100, 300 * dense)
    assert ledger.training_zeros_skipped == (100, 300 * sparse)
    assert ledger.total == (110, 310 * dense)
    assert ledger.total_zeros_skipped == (110, 310 * sparse)
    child = Ledger()
    child.inherit(ledger)
    assert child.total_zeros_skipped == ledger.total_zeros_skipped


def test_without_masks_nothing_is_skipped() -> None:
    ledger = _trained(DEPTH, 7)
    assert ledger.total_zeros_skipped == ledger.total
    ledger.charge("teacher", None, PARENT, 0, training=False)
    assert ledger.total_zeros_skipped == (None, None)


@pytest.mark.parametrize(("label", "steps"), [(10, 2500), (30, 7500), (50, 12500), (200, 50000), (500, 125000)])
def test_a_step_of_the_paper_has_4194304_tokens(label: int, steps: int) -> None:
    tokens_per_step = 512 * 8192
    ledger = Ledger()
    ledger.charge("training", steps * tokens_per_step, DEPTH, 0, training=True, tokens_per_step=tokens_per_step)
    assert ledger.charges[0].steps == steps
    tokens = ledger.training.tokens
    assert tokens is not None
    assert tokens / (label * 1e9) == pytest.approx(1.048576)


def test_totals_are_the_sums_of_their_charges() -> None:
    generator = random.Random(0)
    for _ in range(20):
        ledger = Ledger()
        for _ in range(6):
            activity = generator.choice(get_args(Activity))
            ledger.charge(activity, generator.randrange(1, 10**12), DEPTH, 0, training=generator.random() < 0.5)
        tokens = flops = 0
        for charge in ledger.charges:
            if charge.activity != "evaluation":
                tokens += charge.tokens or 0
                flops += charge.flops or 0
        assert ledger.total == (tokens, flops)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": -1}, "a count that is not a whole number of 0 or more"),
        ({"flops": 1.5}, "a count that is not a whole number of 0 or more"),
        ({"tokens": None}, "60 FLOPs for None tokens"),
        ({"flops": None}, "None FLOPs for 10 tokens"),
        ({"tokens": 0}, "60 FLOPs for 0 tokens"),
        ({"flops_zeros_skipped": 61}, r"more FLOPs with zeros skipped \(61\) than without \(60\)"),
        ({"tokens_per_step": 4}, "10 tokens in steps of 4"),
    ],
)
def test_a_charge_that_does_not_add_up_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_json(tmp_path / "ledger.json", [{"activity": "training", "tokens": 10, "flops": 60, **changes}])
    with pytest.raises(UserError, match=f"does not add up: training has {message}"):
        Ledger.load(tmp_path / "ledger.json")


def test_totals_that_are_not_the_sums_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    _trained(DEPTH, 10).save(path)
    data = read_json(path)
    data["total"]["tokens"] = 11
    write_json(path, data)
    with pytest.raises(UserError, match=r"does not add up: it states \{'tokens': 11.* for total"):
        Ledger.load(path)


def test_more_zeros_than_weights_are_refused() -> None:
    with pytest.raises(UserError, match="does not add up"):
        Ledger().charge("training", 1, DEPTH, 0, training=True, masked_parameters=PARENT.parameters)
