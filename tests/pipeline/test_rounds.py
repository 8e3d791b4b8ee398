"""A target in rounds, trained on Megatron's ranks: killed in the middle of a round, started by others, spread out."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.pipeline.look_ahead import look_ahead
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.system.files import read_json
from nemo_pvs.training import metrics, trainer
from nemo_pvs.training.job import METRICS_FILE, TrainingJob
from nemo_pvs.training.learning_rate import linear_warmup
from tests.families import save_tiny
from tests.megatron.launcher import ForkedLauncher
from tests.megatron.ranks import run_ranks
from tests.pipeline.test_pipeline import _records, tiny_values
from tests.pipeline.test_whole_run import _in_child

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


def staged_values(folder: Path) -> dict:
    """Return the tiny recipe with one target in two rounds, uneven under TP=2, and 16 steps in all."""
    values = tiny_values(folder)
    values["targets"] = {
        "one": {
            "method": "adapt-pruner",
            "ratio": 0.2,
            "stages": 2,
            "slice_optimizer_state": True,
            "iterations": 10,
            "ffn_multiple": 2,
            "kv_groups_multiple": 2,
            "layout": {"tensor_parallel": 2},
        }
    }
    values["train"] |= {"warmup_fraction": 0.2, "decay_fraction": 0.25, "checkpoints": 4}
    values["evaluate"] = {"samples": 8, "sequence_length": 32}
    return values


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, Pipeline]:
    """A recipe, and its run, which was killed in the middle of the first round's training and gone on with."""
    tmp_path = tmp_path_factory.mktemp("staged")
    staged = staged_values(tmp_path)
    folder = tmp_path / "run"
    first = folder / "train" / "one-stages" / "1"
    child = _in_child(staged, folder)
    deadline = time.monotonic() + 600
    while not [point for point in metrics.read(first / METRICS_FILE).training if point["step"] >= 5]:
        assert time.monotonic() < deadline, "training did not get to step 5"
        assert child.is_alive(), "the run ended"
        time.sleep(0.02)
    child.kill()
    child.join()
    finished = {name: time_ for name, time_ in _records(folder).items() if not name.endswith(".begun.json")}
    assert "prune-one-stage-1.json" in finished
    assert "train-one-stage-1.json" not in finished

    pipeline = Pipeline(parse_recipe(staged, "test"), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_launch", ForkedLauncher)
        pipeline.run()
    assert finished.items() <= _records(folder).items(), "a finished stage was done again"
    assert (first / "log.txt").read_text().count("step 4/8  tokens") == 1, "the killed training started again"
    trained = [stage for stage in pipeline.records if not stage.startswith("evaluate/")]
    assert list(look_ahead(pipeline)) == trained, "a stage was done that nobody had looked at"
    return staged, pipeline


def test_rounds_are_one_training(whole):
    staged, pipeline = whole
    folder = pipeline.folder
    first = folder / "train" / "one-stages" / "1"

    # One schedule over both rounds, data where the first has ended, what is left of its moments.
    last = folder / "train" / "one-pruned"
    assert "optimizer state of step=7-last after 8 steps is carried over" in (last / "log.txt").read_text()
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
    for number, shape in enumerate(shapes, 1):
        wanted = parent.parameters * (1 - 0.1 * number)
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
    assert half == [losses[0], pipeline.records.evaluation("one-pruned-initial").validation.loss]
    assert (pruned.validation[0].tokens, pruned.validation[-1].loss) == (4 * 128, losses[1])
    assert pruned.test_perplexity_before is None

    ledger = Ledger.load(folder / "models" / "one-pruned" / LEDGER)
    assert ledger.training.tokens == 16 * 128
    assert ledger.training.flops == sum(
        8 * 128 * shape.flops_per_token(sequence_length=32, training=True) for shape in shapes
    )
    activities = [charge.activity for charge in ledger.charges]
    assert activities == ["parent pretraining", "calibration", "training", "calibration", "training"]

    # Had it been killed between its last checkpoint and its last validation, the report would not lack the end.
    curve = (last / METRICS_FILE).read_text().splitlines(keepends=True)
    (last / METRICS_FILE).write_text("".join(line for line in curve if line != curve[-1]))
    assert metrics.read(last / METRICS_FILE).validation[-1]["step"] < 8
    (folder / "stages" / "evaluate-one-pruned.json").unlink()
    pipeline.evaluate()
    pruned, _ = assemble(pipeline).arms
    assert pruned.validation[-1].tokens == 16 * 128
    assert pruned.validation[-1].loss == pytest.approx(losses[1], abs=1e-3)


def _train(job: TrainingJob) -> None:
    from nemo_pvs.megatron.rank import train_on_cpu

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train_on_cpu(job)


def train(file: Path) -> list[float]:
    """Be what starts the ranks of a job; return the losses."""
    job = TrainingJob.load(file)
    run_ranks(job.layout.processes, _train, job)
    return [point["loss"] for point in metrics.read(job.metrics).training]


@pytest.mark.parametrize("layout", [{"pipeline_parallel": 2}, {"data_parallel": 2}], ids=["PP=2", "DP=2"])
def test_ranks_that_others_start_train_between_rounds(whole, layout, tmp_path):
    """Job after job, at another layout: the same curve, the same units, the same charges as in one go at TP=2."""
    _, reference = whole
    values = staged_values(tmp_path)
    values["targets"]["one"]["layout"] = layout
    recipe, folder = parse_recipe(values, "test"), tmp_path / "run"
    (share,) = Pipeline(recipe, folder).prepare_only()
    assert share == folder / "train" / "one-stages" / "1" / "job.json"
    assert Pipeline(recipe, folder).prepare_only() == [share], "it was not trained yet"
    losses = train(share)
    pruned, scratch = Pipeline(recipe, folder).prepare_only()
    assert (pruned.parent.name, scratch.parent.name) == ("one-pruned", "one-random")
    losses += train(pruned)
    (arm, _) = assemble(reference).arms
    assert losses == pytest.approx([point.loss for point in arm.training], abs=1e-3)
    ours, theirs = (Plan.load(path / "pruned" / "one" / "plan.json") for path in (folder, reference.folder))
    assert (ours.keep_ffn, ours.keep_kv_groups) == (theirs.keep_ffn, theirs.keep_kv_groups)
    charges = [read_json(path / "stages" / "prune-one.json")["result"] for path in (folder, reference.folder)]
    assert charges[0]["charges"] == charges[1]["charges"]


def test_rounds_of_another_family(tmp_path, monkeypatch):
    """Adapt-Pruner on a Qwen 2, as in the packaged recipe for Qwen 2.5: uneven layers in a family that has biases."""
    staged = staged_values(tmp_path)
    staged["parent"] = {"source": str(save_tiny(tmp_path / "qwen2", "qwen2", num_hidden_layers=4))}
    pipeline = Pipeline(parse_recipe(staged, "test"), tmp_path / "run")
    monkeypatch.setattr(trainer, "_launch", ForkedLauncher)
    pipeline.run()
    for arm in ("one-pruned", "one-random"):
        model = open_source(pipeline.folder / "models" / arm)
        assert model.config["model_type"] == "pruned_qwen2"
        assert shape_of(model).uneven
        assert shape_of(model).features == ("qkv_bias",)
    log = (pipeline.folder / "train" / "one-pruned" / "log.txt").read_text()
    assert "optimizer state of step=7-last after 8 steps is carried over" in log
    pruned, _ = assemble(pipeline).arms
    assert pruned.validation[-1].loss < pruned.validation[0].loss
