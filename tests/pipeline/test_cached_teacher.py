"""A whole run whose arms read a teacher's answers from one cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_pvs.cluster.experiment import stages
from nemo_pvs.cluster.profile import load_profile
from nemo_pvs.data.teacher_cache import TeacherCache
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import LEDGER, SHARED_ANSWERS, Ledger
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.records import TaughtRecord
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.reporting.html import write_report
from nemo_pvs.training import metrics
from nemo_pvs.training.job import METRICS_FILE
from nemo_pvs.training.teaching_job import TeachingJob, load_job
from tests.pipeline.test_pipeline import tiny_values


@pytest.fixture(name="values")
def values_fixture(tmp_path) -> dict:
    values = tiny_values(tmp_path)
    values["evaluate"] = {"samples": 8, "sequence_length": 32}
    values["train"] |= {"tokens": 512, "validations": 1, "checkpoints": 1}
    values["train"]["distill"] = {"temperature": 2.0, "cache": {"top_k": 16, "precision": "fp32"}}
    return values


def _curves(recipe, folder: Path) -> dict[str, list[float]]:
    return {
        arm.name: [point["kl"] for point in metrics.read(folder / "train" / arm.name / METRICS_FILE).training]
        for arm in recipe.runs
    }


@pytest.mark.parallel
@pytest.mark.slow
def test_all_arms_read_one_cache_and_pay_for_it_once(values, tmp_path, forked_launcher):
    """Pruned and random arms, at TP=2 and PP=2, learn what they learn online; the ledgers add up to one pass."""
    recipe, folder = parse_recipe(values, "test"), tmp_path / "run"
    pipeline = Pipeline(recipe, folder)
    pipeline.run()
    cache = TeacherCache.open(folder / "teacher" / "1")
    assert cache.content.tokens == 512
    assert pipeline.records.of(TaughtRecord)["teach/1"].kept == cache.kept_probability()
    values["train"]["distill"] = {"temperature": 2.0, "top_k": 16}
    Pipeline(parse_recipe(values, "test"), tmp_path / "online").run()
    online = _curves(recipe, tmp_path / "online")
    for name, curve in _curves(recipe, folder).items():
        assert curve[0] == pytest.approx(online[name][0], rel=2e-6)
        assert curve == pytest.approx(online[name], rel=1e-4)
    ledgers = [Ledger.load(folder / "models" / arm.name / LEDGER) for arm in recipe.runs]
    shares = [charge for ledger in ledgers for charge in ledger.charges if charge.note == SHARED_ANSWERS]
    assert [charge.tokens for charge in shares] == [128] * 4
    write_report(assemble(pipeline), folder)
    assert "its forward passes are charged once, to these arms in proportion" in (folder / "report.md").read_text()

    shutil.rmtree(folder / "teacher")  # arms are trained, so nothing needs it any more
    Pipeline(recipe, folder).run()
    assert not (folder / "teacher").exists()


def test_the_teacher_is_prepared_before_the_arms(values, tmp_path):
    """What a cluster is given: first the teacher's job; arms are prepared when its cache is complete."""
    values["targets"] = {"depth": values["targets"]["depth"]}
    values["layout"] = {"tensor_parallel": 2, "data_parallel": 2}
    recipe, folder = parse_recipe(values, "test"), tmp_path / "run"
    (path,) = Pipeline(recipe, folder).prepare_only()
    assert path == folder.resolve() / "teacher" / "1" / "job.json"
    job = load_job(path)
    assert isinstance(job, TeachingJob)
    assert (job.layout.tensor_parallel, job.layout.processes) == (2, 4)
    assert (job.content.first, job.content.end) == (0, 16)
    assert Pipeline(recipe, folder).prepare_only() == [path], "it has not answered yet"

    planned = stages(recipe, "test", folder, load_profile("local_cpu"))
    names = [command.name for command in planned]
    assert names == ["prepare-teacher", "teach-1", "prepare", "train-depth-pruned", "train-depth-random", "report"]
    assert str(path) in planned[1].arguments
    assert planned[1].layout == job.layout
    assert planned[2].after == ["teach-1"]

    values["train"]["distill"]["cache"]["top_k"] = 17
    with pytest.raises(UserError, match="teacher/1 was made with top_k 16, not 17"):
        Pipeline(parse_recipe(values, "test"), folder).prepare_only()
    values["train"]["distill"]["cache"]["top_k"] = 16
    values["train"]["precision"] = "auto"
    with pytest.raises(UserError, match="teacher/1 was made with arithmetic fp32, not auto"):
        Pipeline(parse_recipe(values, "test"), folder).prepare_only()


def test_an_arm_is_not_trained_from_a_cache_that_was_replaced(values, tmp_path):
    values["targets"] = {"depth": values["targets"]["depth"]}
    recipe, folder = parse_recipe(values, "test"), tmp_path / "run"
    (path,) = Pipeline(recipe, folder).prepare_only()
    job = load_job(path)
    assert isinstance(job, TeachingJob)
    for shard in job.cache.missing():
        (job.folder / f"{shard:06}.safetensors").write_bytes(b"of no matter here")
    assert all("train" in str(path) for path in Pipeline(recipe, folder).prepare_only())
    description = json.loads((job.folder / "cache.json").read_text())
    (job.folder / "cache.json").write_text(json.dumps({**description, "seed": 99}))
    with pytest.raises(UserError, match=r"teacher.1 (was made|holds a teacher cache made) with seed 99"):
        Pipeline(recipe, folder).prepare_only()
