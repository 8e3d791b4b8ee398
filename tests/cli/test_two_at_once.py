"""Two commands in one folder: the second says who is at work, ends with 2, and touches nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nemo_pvs.cli.verbs import VERBS
from nemo_pvs.errors import UserError
from nemo_pvs.megatron import launch
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import Trainer
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.system.lock_holder import holder

_RECIPE = {
    "name": "tiny",
    "title": "tiny",
    "targets": {"width": {"method": "minitron-width", "ffn": 48}},
    "arms": ["pruned"],
    "calibrate": {"samples": 4, "sequence_length": 32},
    "evaluate": {"samples": 2, "sequence_length": 32},
    "train": {"tokens": 512, "sequence_length": 32, "global_batch_size": 4, "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and text."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_tokenizer(make_tiny_llama(folder / "model"))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": "w3 w4 w5 w6 " * 30}) for _ in range(40)))
    recipe = {**_RECIPE, "parent": {"source": str(folder / "model")}, "data": {"source": str(folder / "text.jsonl")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


_COMMANDS = {
    "run": ("locked_folder", "run recipe.yaml --out OUT"),
    "run prepare": ("locked_folder", "run recipe.yaml --out OUT --prepare-only"),
    "run launch": ("locked_folder", "run recipe.yaml --out OUT --launch local_cpu"),
    "train": ("locked_folder", "train model OUT --data nowhere --tokens 512"),
    "teach": ("locked_folder", "teach model --out OUT --data nowhere --tokens 512"),
    "tokenizer": ("locked_target", "tokenizer text.jsonl --vocab 258 --out OUT"),
    "tokenize": ("locked_folder", "tokenize text.jsonl --tokenizer model --out OUT"),
    "evaluate": ("locked_folder", "evaluate model --perplexity text.jsonl --out OUT"),
    "convert": ("locked_target", "convert model OUT"),
    "calibrate": ("locked_target", "calibrate model --data text.jsonl --out OUT --samples 4 --sequence-length 32"),
    "prune": ("locked_target", "prune model OUT --method magnitude --sparsity 0.5"),
    "search": ("locked_target", "search model --scores scores --parameters 8e4 --tolerance 0.9 --out OUT"),
}
_READ_ONLY = {
    "inspect",
    "report",
    "methods",
    "recipes",
    "budget",
    "doctor",
    "scaling_fit",
    "scaling_predict",
    "advise",
}
"""They write nothing, or files that are replaced as a whole."""


def test_every_verb_either_has_a_lock_or_needs_none():
    assert {verb.__name__ for verb in VERBS} == {name.split()[0] for name in _COMMANDS} | _READ_ONLY


@pytest.mark.slow
@pytest.mark.parametrize("name", _COMMANDS)
def test_the_second_is_refused_before_it_touches_anything(pvs, place, monkeypatch, tmp_path, name):
    monkeypatch.chdir(place)
    kind, command = _COMMANDS[name]
    if name == "search":
        calibrate = "calibrate model --data text.jsonl --out scores --samples 4 --sequence-length 32"
        assert pvs(*calibrate.split()).code == 0
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    out = tmp_path / "out"
    with holder(out, kind) as first:
        around = sorted(tmp_path.rglob("*"))
        done = pvs(*command.replace("OUT", str(out)).split())
        assert done.code == 2, done
        assert f"pvs: {out} is in use by" in done.errors
        assert f"process {first.pid} on" in done.errors
        assert sorted(tmp_path.rglob("*")) == around
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_a_dry_run_needs_no_lock(pvs, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    with holder(tmp_path / "out"):
        assert pvs("run", "recipe.yaml", "--out", tmp_path / "out", "--dry-run").code == 0


def _job(folder: Path) -> TrainingJob:
    training = Training(tokens=512, sequence_length=32, global_batch_size=4, learning_rate=1e-3, validation_samples=4)
    layout = Parallelism(tensor_parallel=2)
    return TrainingJob("arm", folder / "run", folder / "initial", {}, layout=layout, training=training)


@pytest.mark.slow
def test_a_job_is_trained_by_one_command_only(tmp_path, capsys, monkeypatch):
    """An arm that Slurm trains, and ``pvs run`` that would train it too; and the job submitted twice."""
    job = _job(tmp_path)
    file = str(job.save())
    with holder(job.folder) as first:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=f"process {first.pid} on"), Trainer(tmp_path / "log") as trainer:
            trainer.train(job)
        assert launch.main([file]) == 2
        for name, value in {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0}.items():
            monkeypatch.setenv(name, str(value))
        for name, value in {"SLURM_NTASKS": 2, "SLURM_STEP_TASKS_PER_NODE": 2, "SLURM_JOB_ID": 7}.items():
            monkeypatch.setenv(name, str(value))
        for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.setenv(name, "0")  # so that what the launcher sets is undone
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29500")
        assert launch.main(["--slurm", file]) == 2
        assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().err.count(f"process {first.pid} on") == 2


def test_ranks_that_do_not_fit_the_job_are_refused(tmp_path, capsys, monkeypatch):
    file = str(_job(tmp_path).save())
    monkeypatch.setenv("WORLD_SIZE", "")
    assert launch.main([file]) == 2
    assert "The variable WORLD_SIZE is ''" in capsys.readouterr().err
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert launch.main([file]) == 2
    assert "arm needs 2 ranks, but the variable WORLD_SIZE is 3; start 2." in capsys.readouterr().err
