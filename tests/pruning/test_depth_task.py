"""Windows of layers by a task's score."""

from __future__ import annotations

import pytest

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pruning.request import Scored
from nemo_pvs.pruning.structured.depth import plan_depth, scan_windows
from nemo_pvs.pruning.structured.depth_task import TaskScan, plan_task, scan_task
from tests.pruning.test_depth import LAYERS, six_layers, token_set
from tests.state_source import StateSource


@pytest.mark.slow
def test_minus_the_loss_as_a_score_agrees_with_the_scan_by_loss() -> None:
    source, tokens = StateSource(six_layers()), token_set()
    steps: list[tuple[int, int]] = []
    scan = scan_task(
        source,
        2,
        lambda model: Scored(-perplexity(model, tokens)["loss"], {}),
        progress=lambda done, total: steps.append((done, total)),
    )
    by_loss = scan_windows(source, tokens, 2)
    assert scan.scores == tuple(-loss for loss in by_loss.losses)
    assert scan.dense_score == -by_loss.dense_loss
    assert plan_task(scan).keep_layers == plan_depth(by_loss).keep_layers
    assert plan_task(scan).provenance["model_fingerprint"] == fingerprint(source)
    assert steps == [(done, 6) for done in range(1, 7)]


def test_the_scorer_sees_the_shortened_models() -> None:
    seen: list[int] = []

    def score(model: WeightSource) -> Scored:
        seen.append(shape_of(model).layers)
        return Scored(0.0, {5: 2, 9: 1})

    source = StateSource(six_layers())
    scan = scan_task(source, 4, score)
    assert seen == [LAYERS, 2, 2, 2]
    assert scan.tokens == 4 * (2 * 5 + 9)
    shape = shape_of(source)
    assert scan.flops == sum(
        tokens * model.flops_per_token(sequence_length=length, training=False)
        for model in (shape, *[shape.replace(layers=2)] * 3)
        for length, tokens in ((5, 10), (9, 9))
    )


def test_the_highest_score_wins_the_first_of_equals_and_compat_the_nearest() -> None:
    shape = shape_of(StateSource(six_layers()))
    scan = TaskScan(shape, "f", 4, scores=(0.55, 0.9, 0.9), dense_score=0.6)
    assert plan_task(scan).keep_layers == (0, 5)
    assert plan_task(scan, compat=True).keep_layers == (4, 5)
    assert plan_task(scan).target == shape.replace(layers=2)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match="score is not a number"):
        scan_task(StateSource(six_layers()), 4, lambda _: Scored(float("nan"), {}))
    with pytest.raises(UserError, match="Cannot remove 6 of 6"):
        scan_task(StateSource(six_layers()), 6, lambda _: Scored(0.0, {}))
