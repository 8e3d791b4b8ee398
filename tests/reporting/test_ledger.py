from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.files import write_json
from nemo_pvs.reporting.ledger import Charge, Ledger
from nemo_pvs.shape import Shape

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
        ([{"activity": "training", "tokens": 1}], "no ledger of nemo_pvs"),
        ([{"activity": "holiday", "tokens": 1, "flops": 1}], "charges 'holiday'; known are parent pretraining"),
        ([1], "no ledger of nemo_pvs"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path / "ledger.json", content)
    with pytest.raises(UserError, match=message):
        Ledger.load(tmp_path / "ledger.json")
