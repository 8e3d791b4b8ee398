"""The search against measuring every candidate by hand, and that it can be interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.search.grid import Grid, SizeLimit, flops_at, legal_shapes
from nemo_pvs.pruning.search.search import Candidate, search
from nemo_pvs.pruning.structured.joint import plan_joint
from nemo_pvs.system.files import sha256_json
from tests.pruning.test_depth import six_layers, token_set
from tests.pruning.test_width import make_scores
from tests.state_source import StateSource, as_transformers

FLOPS = flops_at(25)


@pytest.fixture(name="model", scope="module")
def measured_model() -> tuple[StateSource, Scores, TokenSet, list[Shape]]:
    source, tokens = StateSource(six_layers()), token_set()
    scores = calibrate(source, tokens)
    steps = {"layers_step": 2, "hidden_step": 8, "ffn_step": 32, "kv_groups_step": 1, "heads_step": 1}
    grid = Grid.of(scores.shape, **steps, max_width_pruning=0.6, max_depth_pruning=0.5)
    shapes = legal_shapes(scores.shape, grid, SizeLimit(parameters=0.6 * scores.shape.parameters, tolerance=0.1))
    assert 12 <= len(shapes) <= 40
    assert len({(shape.kv_groups, shape.heads) for shape in shapes}) > 2
    return source, scores, tokens, shapes


def loss_by_transformers(source: StateSource, plan: Plan, ids: torch.Tensor) -> float:
    model = as_transformers(PrunedSource(source, plan))
    with torch.no_grad():
        logits = model(ids[:, :-1].long(), use_cache=False).logits.double()
    return float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().long()))


@pytest.mark.slow
def test_every_candidate_has_the_loss_of_its_own_model(model: Any) -> None:
    source, scores, tokens, shapes = model
    shapes = shapes[::4]
    ranking = search(source, scores, tokens, shapes, FLOPS, shortlist=None)
    found = ranking.candidates
    assert {candidate.shape for candidate in found} == set(shapes) == set(ranking.run)
    losses = [candidate.loss for candidate in found]
    assert losses == sorted(losses)
    for candidate in found:
        expected = loss_by_transformers(source, plan_joint(scores, candidate.shape), tokens.ids)
        assert candidate.loss == pytest.approx(expected, rel=1e-5)
        assert candidate.flops_per_token == FLOPS(candidate.shape)
    assert ranking.tokens_read == 4 * 25 * len(shapes)
    assert ranking.flops == sum(round(4 * 25 * FLOPS(shape)) for shape in shapes)


@pytest.mark.slow
def test_the_shortlist_has_those_whose_sizes_cost_least_one_by_one(model: Any) -> None:
    """Sizes measured alone, by transformers; what lies between them is on the straight line."""
    source, scores, tokens, shapes = model
    parent = scores.shape
    steps: list[tuple[int, int]] = []
    ranking = search(
        source, scores, tokens, shapes, FLOPS, shortlist=2, progress=lambda done, total: steps.append((done, total))
    )
    dense = loss_by_transformers(source, plan_joint(scores, parent), tokens.ids)
    costs: dict[str, dict[int, float]] = {}
    for name in ("layers", "hidden", "ffn", "kv_groups", "heads_per_group"):
        values = sorted({getattr(shape, name) for shape in shapes})
        costs[name] = {getattr(parent, name): 0.0}
        for value in {values[0], values[len(values) // 2]} - costs[name].keys():
            alone = parent.replace(heads=2 * value) if name == "heads_per_group" else parent.replace(**{name: value})
            plan = plan_joint(scores, alone)
            costs[name][value] = loss_by_transformers(source, plan, tokens.ids) - dense

    def cost(name: str, size: int) -> float:
        below = max(value for value in costs[name] if value <= size)
        above = min(value for value in costs[name] if value >= size)
        if below == above:
            return costs[name][size]
        share = (size - below) / (above - below)
        return (1 - share) * costs[name][below] + share * costs[name][above]

    estimates = {shape: dense + sum(cost(name, getattr(shape, name)) for name in costs) for shape in shapes}
    best = sorted(shapes, key=estimates.__getitem__)
    for candidate in ranking.candidates:
        assert candidate.estimated_loss == pytest.approx(estimates[candidate.shape], rel=1e-4)
    assert {candidate.shape for candidate in ranking.candidates[:2]} == set(best[:2])
    assert [candidate.loss is None for candidate in ranking.candidates] == [False] * 2 + [True] * (len(shapes) - 2)
    probes = 1 + sum(len(values) - 1 for values in costs.values())
    assert len(ranking.run) == probes + 2
    assert ranking.run[0] == parent
    assert steps[-1] == ((probes + 2) * 6, (probes + 2) * 6)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_few_candidates_are_all_run_and_need_no_estimate(model: Any) -> None:
    source, scores, tokens, shapes = model
    ranking = search(source, scores, tokens, shapes[:4], FLOPS, shortlist=2)
    assert len(ranking.run) == 4
    assert all(candidate.estimated_loss is None and candidate.loss for candidate in ranking.candidates)


def test_retraining_has_the_last_word(model: Any) -> None:
    """A retraining that turns the order of the best two around, and never sees the third."""
    source, scores, tokens, shapes = model
    before = search(source, scores, tokens, shapes[:3], FLOPS).candidates
    plans: list[Plan] = []

    def retrain(plan: Plan) -> float:
        plans.append(plan)
        return 3.0 - len(plans)

    after = search(source, scores, tokens, shapes[:3], FLOPS, retrain=retrain, retrain_best=2).candidates
    assert [plan.target for plan in plans] == [candidate.shape for candidate in before[:2]]
    assert [candidate.shape for candidate in after] == [before[place].shape for place in (1, 0, 2)]
    assert [candidate.retrained_loss for candidate in after] == [1.0, 2.0, None]
    assert [candidate.loss for candidate in after] == [before[place].loss for place in (1, 0, 2)]


def test_an_interrupted_retraining_begins_with_the_candidate_that_is_next(model: Any, tmp_path: Path) -> None:
    source, scores, tokens, shapes = model
    settings: dict[str, Any] = {"retrain_best": 3, "retrained": "so", "state": tmp_path / "search.json"}
    asked: list[Shape] = []

    def retrain(plan: Plan) -> float:
        asked.append(plan.target)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return float(len(asked))

    with pytest.raises(KeyboardInterrupt):
        search(source, scores, tokens, shapes[:3], FLOPS, retrain=retrain, **settings)
    found = search(source, scores, tokens, shapes[:3], FLOPS, retrain=retrain, **settings).candidates
    assert asked[1] == asked[2]
    assert len(set(asked)) == 3 == len(asked) - 1
    assert [(one.shape, one.retrained_loss) for one in found] == [(asked[0], 1.0), (asked[1], 3.0), (asked[3], 4.0)]


@pytest.mark.slow
def test_an_interrupted_search_goes_on(model: Any, tmp_path: Path) -> None:
    source, scores, tokens, shapes = model
    state = tmp_path / "search.json"
    wanted = search(source, scores, tokens, shapes, FLOPS, shortlist=1)

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(source, scores, tokens, shapes, FLOPS, shortlist=1, state=state, progress=interrupt)
    missing = len(wanted.run) - len(json.loads(state.read_text())["loss"])
    assert 0 < missing < len(wanted.run)
    # Each model that is run reads the embedding once.
    source.reads.clear()
    assert search(source, scores, tokens, shapes, FLOPS, shortlist=1, state=state) == wanted
    assert source.reads.count("model.embed_tokens.weight") == missing
    assert search(source, scores, tokens, shapes, FLOPS, shortlist=1, state=state) == wanted
    assert source.reads.count("model.embed_tokens.weight") == missing


def test_the_state_has_the_keys_that_earlier_versions_wrote(model: Any, tmp_path: Path) -> None:
    """A search that an earlier version began goes on with them."""
    source, scores, tokens, shapes = model
    state = tmp_path / "search.json"
    shape = next(shape for shape in shapes if shape.heads_per_group == 4)
    search(source, scores, tokens, [shape], FLOPS, state=state, retrain=lambda plan: 1.0, retrained="so")
    written = json.loads(state.read_text())
    key = f"layers={shape.layers},hidden={shape.hidden},ffn={shape.ffn},kv_groups={shape.kv_groups}"
    assert written.keys() == {"settings_sha256", "settings", "loss", "retrained_loss so"}
    assert written["settings"].keys() == {"scores", "tokens", "aggregation", "layer_order", "dtype"}
    assert written["settings_sha256"] == sha256_json(written["settings"])
    assert written["loss"].keys() == written["retrained_loss so"].keys() == {key}
    fewer_heads = shape.replace(heads=shape.heads // 2)
    search(source, scores, tokens, [fewer_heads], FLOPS, state=state)
    assert json.loads(state.read_text())["loss"].keys() == {key, f"{key},heads={fewer_heads.heads}"}


def test_the_file_of_another_search_is_refused(model: Any, tmp_path: Path) -> None:
    source, scores, tokens, shapes = model
    state = tmp_path / "search.json"
    search(source, scores, tokens, shapes[:1], FLOPS, state=state)
    with pytest.raises(UserError, match="belongs to a search with other scores, text or settings"):
        search(source, scores, tokens, shapes, FLOPS, aggregation="meanabs_l2", state=state)
    with pytest.raises(UserError, match="measured on another model"):
        search(StateSource(six_layers(seed=1)), scores, tokens, shapes, FLOPS)


def test_candidates_sort_by_the_best_that_is_known() -> None:
    shape = make_scores().shape
    retrained = Candidate(shape, 1, estimated_loss=9.0, loss=9.0, retrained_loss=3.0)
    measured = Candidate(shape, 1, estimated_loss=9.0, loss=2.0)
    good, bad = Candidate(shape, 1, estimated_loss=2.5), Candidate(shape, 1, estimated_loss=3.5)
    smaller = Candidate(shape.replace(hidden=3), 1, estimated_loss=3.5)
    ranked = [retrained, measured, good, smaller, bad]
    assert sorted([bad, smaller, measured, good, retrained], key=lambda one: one.rank) == ranked
    diverged = Candidate(shape, 1, estimated_loss=1.0, loss=1.0, retrained_loss=float("nan"))
    broken = Candidate(shape, 1, estimated_loss=1.0, loss=float("nan"))
    for candidates in ([diverged, retrained, broken, measured], [broken, measured, retrained, diverged]):
        best = sorted(candidates, key=lambda one: one.rank)
        assert best[0] is retrained, "a loss that is no number must not decide the order"
        assert best[-1] is broken
