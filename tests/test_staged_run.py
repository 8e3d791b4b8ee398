"""A target in stages, trained on Megatron's ranks, killed in the middle of a stage, and gone on with."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import yaml

from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.files import read_json
from nemo_pvs.learning_rate import linear_warmup
from nemo_pvs.pipeline import Pipeline
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe_file import parse_recipe
from nemo_pvs.reporting.assemble import assemble
from nemo_pvs.reporting.ledger import LEDGER, Ledger
from nemo_pvs.training import metrics
from nemo_pvs.training.job import METRICS_FILE
from tests.test_pipeline import _records, values

__all__ = ["values"]


@pytest.fixture(name="staged")
def staged_values(values: dict) -> dict:
    """The tiny recipe with one target in two stages, uneven under TP=2, and 16 steps in all."""
    values["targets"] = {
        "one": {
            "method": "adapt-pruner",
            "ratio": 0.2,
            "stages": 2,
            "iterations": 10,
            "ffn_multiple": 2,
            "kv_groups_multiple": 2,
            "layout": {"tensor_parallel": 2},
        }
    }
    values["train"] |= {"warmup_fraction": 0.2, "decay_fraction": 0.25, "checkpoints": 4}
    values["evaluate"] = {"samples": 8, "sequence_length": 32}
    return values


@pytest.mark.parallel
@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_stage(staged, tmp_path):
    staged["targets"]["one"]["slice_optimizer_state"] = True
    folder = tmp_path / "run"
    first = folder / "train" / "one-stages" / "1"
    recipe = tmp_path / "staged.yaml"
    recipe.write_text(yaml.safe_dump(staged))
    child = subprocess.Popen([sys.executable, "-m", "nemo_pvs.cli", "run", str(recipe), "--out", str(folder)])
    deadline = time.monotonic() + 600
    while not [point for point in metrics.read(first / METRICS_FILE).training if point["step"] >= 5]:
        assert time.monotonic() < deadline, "training did not get to step 5"
        assert child.poll() is None, "the run ended"
        time.sleep(0.02)
    child.kill()
    child.wait()
    finished = {name: time_ for name, time_ in _records(folder).items() if not name.endswith(".begun.json")}
    assert "prune-one-stage-1.json" in finished
    assert "train-one-stage-1.json" not in finished

    pipeline = Pipeline(parse_recipe(staged, "test"), folder)
    pipeline.run()
    assert finished.items() <= _records(folder).items(), "a finished stage was done again"
    assert (first / "log.txt").read_text().count("step 4/8  tokens") == 1, "the killed stage began anew"

    # One schedule over both stages, data where the first has ended, what is left of its moments.
    last = folder / "train" / "one-pruned"
    assert "optimizer state of step=7-last after 8 steps is carried on" in (last / "log.txt").read_text()
    rates = [point["learning_rate"] for run in (first, last) for point in metrics.read(run / METRICS_FILE).training]
    whole = {"steps": 16, "warmup_steps": 3, "decay_steps": 4, "min_ratio": 0.1}
    assert rates == pytest.approx([3e-3 * linear_warmup(step, **whole) for step in range(16)])
    jobs = [read_json(run / "job.json") for run in (first, last)]
    assert [job["first_token"] for job in jobs] == [0, 8 * 128]
    assert [job["training"]["tokens"] for job in jobs] == [8 * 128, 8 * 128]
    losses = [metrics.read(run / METRICS_FILE).validation[-1]["loss"] for run in (first, last)]
    assert losses[1] < losses[0]

    shapes = [
        shape_of(open_source(path / "huggingface"))
        for path in (folder / "pruned" / "one-stages" / "1", folder / "pruned" / "one")
    ]
    parent = shape_of(open_source(staged["parent"]["source"]))
    for stage, shape in enumerate(shapes, 1):
        wanted = parent.parameters * (1 - 0.1 * stage)
        assert wanted - 4 * 3 * 64 * 2 <= shape.parameters <= wanted + 1
    assert shape_of(open_source(folder / "models" / "one-random")) == shapes[1]
    assert Plan.load(folder / "pruned" / "one" / "plan.json").parent == shapes[0]
    assert not (first / "nemo").exists(), "moments that nobody goes on from fill the disk"

    # The report's curve is that of the whole training, in which the arm lost channels half-way.
    pruned, random = assemble(pipeline).arms
    assert [point.step for point in pruned.training] == list(range(1, 17))
    assert [point.learning_rate for point in pruned.training] == rates
    assert pruned.training[-1].tokens == pruned.validation[-1].tokens == random.validation[-1].tokens == 16 * 128
    half = [point.loss for point in pruned.validation if point.tokens == 8 * 128]
    assert half == [losses[0], pipeline.results["evaluate/one-pruned-initial"]["validation"]["loss"]]
    assert (pruned.validation[0].tokens, pruned.validation[-1].loss) == (4 * 128, losses[1])
    assert pruned.test_perplexity_before is None

    ledger = Ledger.load(folder / "models" / "one-pruned" / LEDGER)
    assert ledger.training.tokens == 16 * 128
    assert ledger.training.flops == sum(
        8 * 128 * shape.flops_per_token(sequence_length=32, training=True) for shape in shapes
    )
    activities = [charge.activity for charge in ledger.charges]
    assert activities == ["parent pretraining", "calibration", "training", "calibration", "training"]


def test_ranks_of_others_cannot_train_between_stages(staged, tmp_path):
    with pytest.raises(UserError, match="without --prepare-only"):
        Pipeline(parse_recipe(staged, "test"), tmp_path / "run").prepare_only()
