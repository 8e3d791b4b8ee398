"""Results of a run that never was."""

from __future__ import annotations

import pytest

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.reporting.results import ArmResult, ParentResult, Point, Results

PARENT = Shape(layers=4, hidden=64, ffn=128, heads=8, kv_groups=2, head_dim=8, vocab=1000, tied=False)
TOKENS = 40_960


def make_arm(target: str, *, pruned: bool, losses: list[float], shape: Shape) -> ArmResult:
    """Return an arm with one validation loss after each equal part of ``TOKENS``, the first before training."""
    ledger = Ledger()
    if pruned:
        ledger.charge("parent pretraining", 1_000_000_000, PARENT, 64, training=True, note="as published")
        ledger.charge("calibration", 2048, PARENT, 64, training=False)
    ledger.charge("training", TOKENS, shape, 64, training=True)
    steps = len(losses) - 1
    return ArmResult(
        name=f"{target}, {'pruned' if pruned else 'scratch'}",
        target=target,
        method=f"minitron-{target}",
        initialisation="pruned" if pruned else "random",
        shape=shape,
        parallel={"tensor": 2, "pipeline": 1, "data": 3},
        validation=[Point(step, step * TOKENS // steps, loss) for step, loss in enumerate(losses)],
        training=[Point(step, step * TOKENS // steps, losses[step], 3e-4 / step) for step in range(1, steps + 1)],
        test_perplexity_before=1234.5,
        test_perplexity_after=45.678,
        ledger=ledger,
        seconds=3725.4,
        tokens_per_second=11.0,
    )


@pytest.fixture
def results() -> Results:
    depth, width = PARENT.replace(layers=2), PARENT.replace(hidden=48, ffn=96)
    return Results(
        title="Half the size",
        recipe_name="tiny/demo",
        recipe={"train": {"steps": 4, "note": "Größe & <order> kept"}, "data": {"seed": 0}},
        created="2026-06-12T10:00:00+00:00",
        environment={"torch": "2.13.0"},
        hashes={"recipe": "ab" * 32},
        parent=ParentResult("tiny parent", PARENT, validation_loss=2.4, test_perplexity=11.02),
        arms=[
            make_arm("depth", pruned=True, losses=[4.0, 2.75, 2.625, 2.54], shape=depth),
            make_arm("depth", pruned=False, losses=[6.9, 3.0, 2.75, 2.64], shape=depth),
            make_arm("width", pruned=True, losses=[5.0, 2.9, 2.8, 2.7], shape=width),
            make_arm("width", pruned=False, losses=[6.9, 2.9, 2.7, 2.5], shape=width),
        ],
    )
