"""What reaches Slurm when somebody submits from inside a job: no variable of that job, in every way of submitting.

``sbatch`` and ``srun`` are stand-ins that write down what they are given.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nemo_run
import pytest
from nemo_run.cli.api import RunContext

from nemo_pvs.cluster.experiment import launch, stages
from nemo_pvs.cluster.profile import load_profile
from nemo_pvs.cluster.slurm_tunnel import without_job
from nemo_pvs.nemo_cli import executors
from nemo_pvs.recipe.load import load_recipe

_OF_THE_ALLOCATION = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOBID": "77",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x3",
    "SLURM_CPU_BIND_LIST": "0x3",
    "SLURM_CPUS_PER_TASK": "2",
    "SLURM_MEM_PER_NODE": "4096",
    "SLURM_MEM_PER_CPU": "512",
    "SLURM_NTASKS": "1",
    "SLURM_NPROCS": "1",
    "SLURM_TRES_PER_TASK": "cpu:2",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURMD_NODENAME": "node7",
    "SRUN_CPUS_PER_TASK": "2",
    "PMIX_RANK": "0",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "node7",
    "TORCHELASTIC_RUN_ID": "x",
    "PVS_HELD_LOCKS": "0123",
}
_OF_THE_USER = {
    "SLURM_ACCOUNT": "physics",
    "SLURM_PARTITION": "h100",
    "SLURM_CONF": "/etc/slurm/slurm.conf",
    "SBATCH_RESERVATION": "ours",
    "WANDB_PROJECT": "pvs",
    "HF_HOME": "/shared/hf",
}


@pytest.fixture
def seen(monkeypatch, tmp_path) -> Callable[[], list[dict[str, str]]]:
    """Be inside an allocation, with a stand-in for Slurm; call it for the environments that sbatch has had."""
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "seen"
    log.mkdir()
    bodies = {"sbatch": f"env >{log}/$$; echo 1$RANDOM", "srun": f"env >{log}/$$"}
    for name in ("sbatch", "srun", "squeue", "scontrol", "sinfo", "sacct"):
        (programs / name).write_text(f"#!/bin/bash\n{bodies.get(name, 'exit 0')}\n")
        (programs / name).chmod(0o755)
    for name, value in {**_OF_THE_ALLOCATION, **_OF_THE_USER}.items():
        monkeypatch.setenv(name, value)
    for name in ("PVS_IMAGE", "PVS_SHARED", "PVS_PYTHON", "PVS_SRUN_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's file copying passes it on; pytest's cannot be read
    monkeypatch.chdir(tmp_path)

    def read() -> list[dict[str, str]]:
        texts = [file.read_text() for file in log.iterdir()]
        return [dict(line.split("=", 1) for line in text.splitlines() if "=" in line) for text in texts]

    return read


def _check(environments: list[dict[str, str]], number: int) -> None:
    assert len(environments) == number
    for environment in environments:
        assert not _OF_THE_ALLOCATION.keys() & environment.keys()
        assert environment.items() >= _OF_THE_USER.items()


@pytest.mark.slow
def test_pvs_run_launch(seen, tmp_path):
    recipe = load_recipe("smollm2_135m/demo")
    profile = load_profile("slurm_h100")
    todo = stages(recipe, "smollm2_135m/demo", tmp_path / "run", profile)
    launch(todo, recipe.name, tmp_path / "run", profile)
    _check(seen(), len(todo))


def test_nemos_own_command(seen, tmp_path):
    executors.register()
    context = RunContext(name="try")
    context.parse_args(["executor=pvs_slurm_h100"])
    with nemo_run.Experiment("try", base_dir=str(tmp_path / "experiments"), log_level="WARNING") as made:
        made.add(nemo_run.Partial(subprocess.getoutput, cmd="true"), executor=context.executor, name="try")
        made.run(detach=True)
    _check(seen(), 1)


def test_the_batch_script_for_sites_without_nemo_run(seen):
    """sbatch hands everything on, and Slurm sets what the script asks for: srun must get that alone."""
    script = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
    of_this_job = {
        "SLURM_JOB_ID": "78",
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_GPUS_PER_NODE": "8",
    }
    environment = {**os.environ, **of_this_job, "SLURM_JOB_NODELIST": "a,b", "JOB": "job.json", "VENV": "/shared/venv"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (environment,) = seen()
    assert environment.items() >= {**_OF_THE_USER, **of_this_job}.items()
    options_of_srun = ("CPU_BIND", "CPU_BIND_LIST", "CPUS_PER_TASK", "MEM_PER_NODE", "MEM_PER_CPU", "TRES_PER_TASK")
    options_of_srun += ("GPUS_PER_TASK", "DISTRIBUTION")
    assert not {f"SLURM_{name}" for name in options_of_srun} & environment.keys()


def test_outside_of_a_job_nothing_is_taken_away():
    of_the_user = {**_OF_THE_USER, "SLURM_CPU_BIND": "none", "PATH": "/bin"}
    assert without_job(of_the_user) == of_the_user
