"""Calibration on several ranks gives the scores, and the plans, of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.pruning.search.grid import flops_at
from nemo_pvs.pruning.search.search import search
from nemo_pvs.pruning.structured.flap import plan_flap
from nemo_pvs.pruning.structured.llm_pruner import plan_llm_pruner
from nemo_pvs.pruning.structured.wanda_sp import plan_wanda_sp
from nemo_pvs.pruning.structured.width import plan_width
from tests.calibration.test_engine import token_set
from tests.megatron.ranks import run_ranks
from tests.state_source import StateSource, tiny_model

pytestmark = pytest.mark.parallel

SAMPLES = 7
"""Neither 2 nor 4 ranks get equal shares."""


def measure(batch_size: int = 2) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the scores, what plans keep by them, and the scores' hash."""
    source = StateSource(tiny_model(num_key_value_heads=4))
    scores = calibrate(source, token_set(samples=SAMPLES), compute=Compute(batch_size=batch_size), gradients=True)
    return {name: tensor.numpy() for name, tensor in scores.tensors.items()}, kept(scores), scores.content_hash


def kept(scores: Scores) -> dict[str, Any]:
    plans = {
        "flap": plan_flap(scores, 0.4),
        "wanda-sp": plan_wanda_sp(scores, 0.3),
        "llm-pruner": plan_llm_pruner(scores, 0.3, structure="AL-AM"),
        "width": plan_width(scores, scores.shape.replace(hidden=40, ffn=50)),
    }
    return {name: (plan.keep_hidden, plan.keep_ffn, plan.keep_kv_groups) for name, plan in plans.items()}


def measure_on_a_rank() -> tuple[dict[str, Any], dict[str, Any], str]:
    torch.distributed.init_process_group("gloo")
    return measure()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_do_not_change_scores_or_plans(world_size: int) -> None:
    expected, plans, _ = measure()
    results = run_ranks(world_size, measure_on_a_rank)
    order_dependent = set() if world_size == 1 else {"attention.fluctuation", "ffn.fluctuation"}
    for scores, its_plans, content_hash in results:
        assert scores.keys() == expected.keys() - order_dependent
        for name, values in scores.items():
            atol = 1e-6 * abs(expected[name]).max() if name.endswith(".mean") else 0
            np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=atol, err_msg=name)
        assert its_plans == plans
        assert content_hash == results[0][2]  # the same bits on every rank


def searched(scores: Scores, state: Path) -> list[tuple[Any, float | None]]:
    """Return what a search knows of three shapes, which the ranks have measured together."""
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    source, tokens = StateSource(tiny_model()), token_set(samples=SAMPLES)
    shapes = [scores.shape.replace(**sizes) for sizes in ({"ffn": 64}, {"hidden": 48}, {"layers": 3})]
    found = search(source, scores, tokens, shapes, flops_at(24), state=state).candidates
    return [(candidate.shape, candidate.loss) for candidate in found]


def test_ranks_search_together(tmp_path: Path) -> None:
    scores = calibrate(StateSource(tiny_model()), token_set(samples=SAMPLES))
    expected = searched(scores, tmp_path / "alone.json")
    ranks = run_ranks(2, searched, scores, tmp_path / "shared.json")
    assert ranks[0] == ranks[1]
    assert [shape for shape, _ in ranks[0]] == [shape for shape, _ in expected]
    assert [loss for _, loss in ranks[0]] == pytest.approx([loss for _, loss in expected], rel=1e-6)
    assert run_ranks(2, searched, scores, tmp_path / "alone.json") == [expected] * 2, (
        "what is known was measured again"
    )


def measure_too_little() -> str:
    torch.distributed.init_process_group("gloo")
    with pytest.raises(UserError) as caught:
        calibrate(StateSource(tiny_model()), token_set(samples=1))
    return str(caught.value)


def test_more_ranks_than_sequences_are_refused() -> None:
    assert "cannot be split over 2 ranks" in run_ranks(2, measure_too_little)[0]
