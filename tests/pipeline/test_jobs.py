"""``pvs run --jobs``: arms side by side are the same to the bit as one after another, also after kill -9."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import TrainingError
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.series import RunSeries
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.system.files import read_json
from nemo_pvs.training import metrics, trainer
from nemo_pvs.training.job import JOB_FILE, METRICS_FILE
from nemo_pvs.training.teaching_job import load_job
from nemo_pvs.training.trainer import Trainer
from tests.megatron.launcher import ForkedLauncher
from tests.megatron.ranks import fork_context
from tests.pipeline.test_pipeline import tiny_values

_ARMS = ("width-pruned", "depth-pruned")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[dict, Path]:
    """A recipe of two targets, and its run folder with all that comes before training."""
    folder = tmp_path_factory.mktemp("jobs")
    values = tiny_values(folder)
    values["arms"] = ["pruned"]
    for target in values["targets"].values():
        del target["layout"]
    values["train"] |= {"tokens": 1536, "validations": 2, "checkpoints": 3}
    values["evaluate"] = {"samples": 8, "sequence_length": 32}
    Pipeline(parse_recipe(values, "test"), folder / "run").prepare_only()
    return values, folder / "run"


def _copy(prepared: tuple[dict, Path], folder: Path) -> Path:
    shutil.copytree(prepared[1], folder)
    return folder


def _run(values: dict, folder: Path, jobs: int) -> None:
    trainer._launch = ForkedLauncher
    RunSeries(parse_recipe(values, "test"), folder, jobs=jobs).run()


def test_the_index_is_there_before_any_rank_starts(prepared):
    """Ranks that wait for the first one to build it would run into NCCL's timeout."""
    job = load_job(prepared[1] / "train" / _ARMS[0] / JOB_FILE)
    (index,) = job.index.glob("*-shuffle_index.npy")
    before = index.stat().st_mtime_ns
    job.build_index()
    assert list(job.index.glob("*-shuffle_index.npy")) == [index], "what was there was of another order"
    assert index.stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def one_after_another(prepared, tmp_path_factory) -> Path:
    folder = _copy(prepared, tmp_path_factory.mktemp("one") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_launch", ForkedLauncher)
        _run(prepared[0], folder, 1)
    assert not (folder / "train" / "launcher-2.log").exists()
    return folder


def _weights(folder: Path) -> list[str]:
    return [str(fingerprint(open_source(folder / "models" / arm))) for arm in _ARMS]


def _losses(folder: Path) -> list[list[float]]:
    curves = [metrics.read(folder / "train" / arm / METRICS_FILE) for arm in _ARMS]
    assert [len(curve.training) for curve in curves] == [12, 12]
    return [[point["loss"] for point in curve.training + curve.validation] for curve in curves]


@pytest.mark.parallel
@pytest.mark.slow
def test_two_at_once_are_the_same_to_the_bit(prepared, one_after_another, tmp_path, forked_launcher):
    folder = _copy(prepared, tmp_path / "run")
    _run(prepared[0], folder, 2)
    assert (folder / "train" / "launcher-2.log").exists(), "they were trained one after another"
    assert _losses(folder) == _losses(one_after_another)
    assert _weights(folder) == _weights(one_after_another)
    for arm in _ARMS:
        record = read_json(folder / "stages" / f"train-{arm}.json")
        curve = metrics.read(folder / "train" / arm / METRICS_FILE)
        assert record["seconds"] > metrics.training_seconds(curve, 128) > 0, "training ahead of the stage took no time"


def _working_in(folder: Path) -> list[int]:
    """Return the ids of the other processes that have a file in a folder open, as their log."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
            if any(file.startswith(f"{folder}/") for file in files) and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def assert_nobody_works_in(folder: Path) -> None:
    """Wait for a moment until a killed run's processes have ended, all of which have a log in its folder open."""
    deadline = time.monotonic() + 10
    while left := _working_in(folder):
        assert time.monotonic() < deadline, f"processes go on without their parent: {left}"
        time.sleep(0.1)


@pytest.mark.parallel
@pytest.mark.slow
def test_kill_9_while_two_are_trained_and_the_same_command_goes_on(
    prepared, one_after_another, tmp_path, forked_launcher
):
    values, _ = prepared
    folder = _copy(prepared, tmp_path / "run")
    child = fork_context().Process(target=_run, args=(values, folder, 2))
    child.start()
    curves = [folder / "train" / arm / METRICS_FILE for arm in _ARMS]
    deadline = time.monotonic() + 240
    # After the first checkpoint of both; if possible while another is being written, by processes that Megatron forks.
    while (steps := min(len(metrics.read(curve).training) for curve in curves)) < 9:
        if steps >= 5 and list(folder.glob("train/*/nemo/checkpoints/step=7-last-unfinished")):
            break
        assert time.monotonic() < deadline, "training did not get to step 8"
        assert child.is_alive(), "the run ended"
        time.sleep(0.01)
    assert _working_in(folder), "nothing to kill"
    child.kill()
    child.join()
    assert_nobody_works_in(folder)
    pipeline = Pipeline(parse_recipe(values, "test"), folder, jobs=2)
    assert not pipeline.is_trained()
    _run(values, folder, 2)
    assert _weights(folder) == _weights(one_after_another)
    assert _losses(folder) == _losses(one_after_another)
    for arm in _ARMS:
        log = (folder / "train" / arm / "log.txt").read_text()
        assert log.count("step 4/12  tokens") == 1, "a killed arm began again instead of at its checkpoint"


@pytest.mark.parallel
@pytest.mark.slow
def test_an_arm_that_fails_is_named_and_the_other_is_trained(prepared, one_after_another, tmp_path, forked_launcher):
    values, _ = prepared
    folder = _copy(prepared, tmp_path / "run")
    width, depth = Pipeline(parse_recipe(values, "test"), folder, jobs=2).trainable()
    width = replace(width, data={**width.data, "train": str(tmp_path / "nowhere")})
    with (
        Trainer(folder / "train" / "launcher.log", 2) as running,
        pytest.raises(TrainingError, match=r"^Training of width-pruned failed; .*/train/width-pruned/log.txt\.$"),
    ):
        running.train_all([width, depth])
    assert "nowhere" in width.log.read_text()
    pipeline = Pipeline(parse_recipe(values, "test"), folder, jobs=2)
    assert [job.name for job in pipeline.trainable()] == ["width-pruned"], "what has failed was not trained"
    pipeline.run()
    assert _weights(folder) == _weights(one_after_another)


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_jobs_are_refused_in_one_sentence(pvs, prepared, tmp_path, monkeypatch, jobs):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(prepared[0]))
    for more in ([], ["--dry-run"]):
        done = pvs("run", "tiny.yaml", "--out", "run", "--jobs", jobs, *more)
        assert done.code == 2
        assert (
            done.errors == f"pvs: --jobs is {jobs}, but at least one arm must be trained at a time; give 1 or more.\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("option", ["--prepare-only", "--force=train", "--ignore-manifest"])
def test_what_a_submission_would_ignore_is_refused(pvs, option):
    done = pvs("run", "smollm2_135m/demo", "--launch", "slurm_h100", option)
    assert done.code == 2
    assert "leave out --prepare-only, --force and --ignore-manifest" in done.errors


@pytest.mark.parametrize("option", [["--prepare-only"], ["--launch", "local_cpu"]])
def test_jobs_of_others_are_refused(pvs, prepared, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(prepared[0]))
    done = pvs("run", "tiny.yaml", "--out", "run", "--jobs", 2, *option)
    assert done.code == 2
    assert "leave it out with --launch or --prepare-only" in done.errors
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
