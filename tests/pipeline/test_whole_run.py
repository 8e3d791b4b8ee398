"""Whole runs on a tiny model, to the report; one is killed in every stage and loses nothing that was finished."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.pipeline.store import Stages
from nemo_pvs.planning.equal_terms import arm_cost
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.reporting.html import write_report
from nemo_pvs.reporting.results import Results
from nemo_pvs.training import metrics, trainer
from nemo_pvs.training.job import METRICS_FILE
from tests.megatron.launcher import ForkedLauncher
from tests.megatron.ranks import fork_context
from tests.pipeline.test_jobs import assert_nobody_works_in
from tests.pipeline.test_pipeline import _records, values_fixture  # noqa: F401

STAGES_BEFORE_TRAINING = ["parent", "data", "calibrate", "prune/width", "random/width", "prune/depth", "random/depth"]


class KilledAfter(Stages):
    """Dies by kill -9 when a stage has done its work and is about to say so: the worst moment."""

    def __init__(self, folder: Path, stage: str) -> None:
        super().__init__(folder)
        self.stage = stage

    def run(self, stage, work=None, *worked):
        def doomed():
            (work or stage.work)()
            os.kill(os.getpid(), signal.SIGKILL)

        return super().run(stage, doomed if stage.name == self.stage else work, *worked)


def _run(values: dict, folder: Path, doomed_stage: str | None = None, forked_launcher: bool = True) -> None:
    pipeline = Pipeline(parse_recipe(values, "test"), folder)
    if doomed_stage:
        pipeline.stages = KilledAfter(folder, doomed_stage)
    if forked_launcher:
        trainer._launch = ForkedLauncher
    pipeline.run()


def _in_child(*arguments):
    """Start a run in its own process, and return that."""
    child = fork_context().Process(target=_run, args=arguments)
    child.start()
    return child


@pytest.mark.parallel
@pytest.mark.slow
def test_kill_9_in_each_stage_loses_no_finished_stage(values, tmp_path, forked_launcher):
    folder = tmp_path / "run"
    finished: dict[str, int] = {}
    for stage in [*STAGES_BEFORE_TRAINING, "evaluate/depth-random"]:
        if stage.startswith("evaluate"):
            _kill_in_the_middle_of_training(values, folder)
            finished = _records(folder) | finished
            finished = {name: time_ for name, time_ in finished.items() if not name.endswith(".begun.json")}
        child = _in_child(values, folder, stage)
        child.join(timeout=300)
        assert child.exitcode == -signal.SIGKILL, stage
        records = _records(folder)
        assert f"{stage.replace('/', '-')}.json" not in records, "a stage that was killed counts as done"
        assert finished.items() <= records.items(), f"killed in {stage}: a finished stage was done again"
        finished = {name: time_ for name, time_ in records.items() if not name.endswith(".begun.json")}

    pipeline = Pipeline(parse_recipe(values, "test"), folder)
    pipeline.run()
    assert finished.items() <= _records(folder).items()
    results = assemble(pipeline)
    write_report(results, folder)
    _check(results, folder, values)


def _kill_in_the_middle_of_training(values: dict, folder: Path) -> None:
    """Kill the run when the first arm has saved its checkpoint of step 8 and gone on; nothing may train on.

    Its launcher is the one that users have, a fresh interpreter.
    """
    curve = folder / "train" / "width-pruned" / METRICS_FILE
    child = _in_child(values, folder, None, False)
    deadline = time.monotonic() + 240
    while not [point for point in metrics.read(curve).training if point["step"] >= 9]:
        assert time.monotonic() < deadline, "training did not get to step 9"
        time.sleep(0.02)
    child.kill()
    child.join()
    assert_nobody_works_in(folder)


def _check(results: Results, folder: Path, values: dict) -> None:
    """Every arm is measured at the same tokens, its model loads in transformers, and the report is there."""
    assert [arm.name for arm in results.arms] == ["width, pruned", "width, random", "depth, pruned", "depth, random"]
    for arm in results.arms:
        assert [point.tokens for point in arm.validation] == [0, 512, 1024, 1536, 2048]
        assert arm.validation[-1].loss < arm.validation[0].loss
        assert arm.ledger.training.tokens == 2048
    log = (folder / "train" / "width-pruned" / "log.txt").read_text()
    assert log.count("step 8/16  tokens") == 1, "the killed arm started over instead of at its checkpoint"
    width = AutoModelForCausalLM.from_pretrained(folder / "models" / "width-pruned")
    assert (width.config.hidden_size, width.config.intermediate_size, width.config.head_dim) == (32, 48, 16)
    depth = AutoModelForCausalLM.from_pretrained(folder / "models" / "depth-random")
    assert depth.config.num_hidden_layers == 2
    assert "<svg" in (folder / "report.html").read_text()
    asked = json.loads((folder / "tasks" / "results.json").read_text())["models"]
    assert len({model["fingerprint"] for model in asked}) == 5, "the parent and four arms"
    assert {model["measured"]["continuation/0-shot/acc"]["documents"] for model in asked} == {8}
    assert len((folder / "tasks.csv").read_text().splitlines()) == 1 + 2 * 2, "average and task for each target"
    assert json.loads((folder / "results.json").read_text())["recipe"]["train"]["tokens"] == values["train"]["tokens"]


@pytest.mark.parallel
@pytest.mark.slow
def test_a_sparse_and_an_uneven_target_train_to_the_report(values, tmp_path, forked_launcher):
    values["targets"] = {
        "wanda": {"method": "wanda", "sparsity": "2:4", "layout": {"pipeline_parallel": 2}},
        "flap": {"method": "flap", "ratio": 0.3},
    }
    values["train"] |= {"warmup": "quadratic", "weight_decay_on": "all"}
    values["budgets"] = {"pruned": [512], "random": [1024, "equal-training-tokens"]}
    folder = tmp_path / "run"
    pipeline = Pipeline(parse_recipe(values, "test"), folder)
    pipeline.run()
    for arm in ("wanda-pruned-512", "wanda-random-equal-training-tokens", "wanda-random-1024"):
        trained = list(matrix_sparsity(open_source(pipeline.model(arm))))
        assert {matrix.pattern for matrix in trained} == {"2:4"}, f"weights of {arm} grew back"
    results = assemble(pipeline)
    assert [arm.ledger.training.tokens for arm in results.arms] == [512, 1024, 512] * 2
    assert results.arms[2].name == "wanda, random, equal training tokens"
    assert [results.scratch_of(arm) for arm in results.arms[::3]] == [results.arms[2], results.arms[5]]
    assert [arm.masked_parameters for arm in results.arms] == [pipeline.parent_shape.matrix_parameters // 2] * 3 + [
        0
    ] * 3
    for arm, measured in zip(pipeline.recipe.runs, results.arms, strict=True):
        for place in (pipeline.job(arm).folder, pipeline.model(arm.name)):
            assert Ledger.load(place / LEDGER) == measured.ledger
    grandchild = Ledger()
    grandchild.inherit_checkpoint(pipeline.model("wanda-pruned-512"), pipeline.parent_shape, None)
    assert grandchild.read == [pipeline.reads(pipeline.recipe.runs[0])]
    assert grandchild.total == results.arms[0].ledger.total
    assert shape_of(open_source(pipeline.model("flap-pruned-512"))).uneven


@pytest.mark.parallel
@pytest.mark.slow
def test_both_arms_learn_from_the_parent_and_are_charged_alike(values, tmp_path, forked_launcher):
    """What a recipe counts before the run is what the ledgers say after it; a new temperature trains again."""
    folder = tmp_path / "run"
    values["targets"] = {"depth": values["targets"]["depth"]}
    values["train"] |= {"tokens": 512, "validations": 1, "checkpoints": 1, "distill": {"temperature": 2.0}}
    recipe = parse_recipe(values, "test")
    pipeline = Pipeline(recipe, folder)
    pipeline.run()
    for arm in recipe.runs:
        curve = metrics.read(folder / "train" / arm.name / METRICS_FILE)
        assert all(point["kl"] > 0 for point in curve.training)
        model = folder / "models" / arm.name
        ledger = Ledger.load(model / LEDGER)
        expected = arm_cost(recipe, arm, shape_of(open_source(model)), pipeline.parent_shape)
        assert ledger == expected
        assert [(one.activity, one.tokens) for one in ledger.charges[-2:]] == [("training", 512), ("teacher", 512)]
        assert ledger.charges[0].activity == "parent pretraining"
    assert assemble(pipeline).arms[0].ledger.total.tokens

    before = _records(folder)
    values["train"]["distill"] |= {"pretraining_tokens": 5, "arms": ["random", "pruned"]}
    again = Pipeline(parse_recipe(values, "test"), folder)
    again.prepare()
    again.prepare_only()
    assert _records(folder) == before, "what changes no training made it be done again"
    values["train"]["distill"]["temperature"] = 1.0
    with pytest.raises(UserError, match=r"made with training.distill.temperature 2.0, not 1.0"):
        Pipeline(parse_recipe(values, "test"), folder).prepare_only()
    Pipeline(parse_recipe(values, "test"), folder, force=("train",)).prepare_only()
    assert "train-depth-pruned.json" in before
    assert "train-depth-pruned.json" not in _records(folder)
