"""A target of efficient-llm in a whole run: killed while units go, it goes on, and is charged for all of it."""

from __future__ import annotations

import time

import pytest

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.pipeline.folder import PLAN
from nemo_pvs.pipeline.look_ahead import look_ahead
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.planning.equal_terms import arm_cost
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.training import metrics
from nemo_pvs.training.job import METRICS_FILE
from tests.pipeline.test_pipeline import values_fixture  # noqa: F401
from tests.pipeline.test_whole_run import _in_child


@pytest.mark.parallel
@pytest.mark.slow
def test_killed_while_units_go_it_goes_on_to_the_report(values, tmp_path, forked_launcher):
    folder = tmp_path / "run"
    parent = shape_of(open_source(values["parent"]["source"]))
    values["targets"] = {
        "small": {
            "method": "efficient-llm",
            "pruning_aware": {
                "parameters": int(0.6 * parent.parameters),
                "tokens": 30 * 128,
                "start_tokens": 2 * 128,
                "pace": "linear",
                "uniform": False,
                "ffn_at_once": 4,
                "layout": {"pipeline_parallel": 2},
            },
        }
    }
    values["train"] |= {"tokens": 512, "validations": 1, "checkpoints": 3}
    values["evaluate"] = {"samples": 8, "sequence_length": 32}
    recipe = parse_recipe(values, "test")
    run = folder / "masks" / "small" / "run"
    child = _in_child(values, folder)
    deadline = time.monotonic() + 280
    while not [point for point in metrics.read(run / METRICS_FILE).training if point["step"] >= 13]:
        assert time.monotonic() < deadline, "training did not get to step 13"
        time.sleep(0.02)
    child.kill()
    child.join()
    assert not (folder / "stages" / "masks-small.json").exists()

    pipeline = Pipeline(recipe, folder)
    pipeline.run()
    trained = [stage for stage in pipeline.records if not stage.startswith("evaluate/")]
    assert list(look_ahead(pipeline)) == trained, "a stage was done that nobody had looked at"
    curve = metrics.read(run / METRICS_FILE)
    assert [point["step"] for point in curve.training] == list(range(1, 31))
    assert curve.pruning[-1]["parameters"] <= 0.6 * parent.parameters
    plan = Plan.load(pipeline.pruned("small") / PLAN)
    assert plan.target.parameters == curve.pruning[-1]["parameters"]
    assert sum(plan.provenance["removals"].values()) > 0
    results = assemble(pipeline)
    assert [arm.name for arm in results.arms] == ["small, pruned", "small, random"]
    for arm in recipe.runs:
        model = open_source(pipeline.model(arm.name))
        assert shape_of(model) == plan.target
        assert Ledger.load(pipeline.model(arm.name) / LEDGER) == arm_cost(recipe, arm, plan.target, parent)
    masked = results.arms[0].ledger.charges[1]
    assert (masked.activity, masked.tokens) == ("mask learning", 30 * 128)
    assert metrics.read(folder / "train" / "small-pruned" / METRICS_FILE).training
