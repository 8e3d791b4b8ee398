"""Launch profiles as executors of NeMo's own command: found by NeMo-Run, changed as it changes them, and run by it."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nemo_run
import pytest
import yaml
from nemo_run.cli.api import RunContext
from nemo_run.run.torchx_backend.packaging import package

from nemo_pvs.cli.factory_names import executor_name
from nemo_pvs.cluster.profile import packaged_profiles
from nemo_pvs.errors import UserError
from nemo_pvs.nemo_cli import executors


@pytest.fixture(autouse=True)
def _site(monkeypatch, tmp_path):
    executors.register()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's file copying passes it on; pytest's cannot be read
    for name, value in {"SLURM_ACCOUNT": "physics", "SLURM_PARTITION": "h100"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PVS_IMAGE", "PVS_SHARED", "PVS_PYTHON", "PVS_SRUN_ARGS"):
        monkeypatch.delenv(name, raising=False)


def _executor(*arguments: str) -> Any:
    """Return what ``nemo llm VERB run.executor=...`` builds, by NeMo-Run's own parser."""
    context = RunContext(name="try")
    context.parse_args(list(arguments))
    return context.executor


def _script(executor: Any, folder: Path) -> str:
    made = nemo_run.Experiment("try", base_dir=str(folder / "experiments"), log_level="WARNING")
    with made:
        made.add(nemo_run.Partial(subprocess.getoutput, cmd="true"), executor=executor, name="try")
        made.dryrun(log=False, delete_exp_dir=False)
    return next((folder / "experiments").rglob("*_sbatch.sh")).read_text()


def test_every_profile_is_an_executor():
    assert packaged_profiles()
    for name in packaged_profiles():
        assert isinstance(_executor(f"executor={executor_name(name)}"), nemo_run.Executor)


def test_slurm_starts_a_rank_a_gpu_in_the_profiles_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PVS_PYTHON", "/shared/venv/bin/python")
    executor = _executor("executor=pvs_slurm_h100", "executor.nodes=16", "executor.time=01:00:00")
    script = _script(executor, tmp_path)
    (tmp_path / "script.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "script.sh")], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    assert {
        name: options[name] for name in ("account", "partition", "nodes", "ntasks-per-node", "time", "signal")
    } == {
        "account": "physics",
        "partition": "h100",
        "nodes": "16",
        "ntasks-per-node": "8",
        "time": "01:00:00",
        "signal": "USR1@300",
    }
    assert "requeue" in options
    assert re.search(r"^export MASTER_ADDR=\$head_node$", script, re.MULTILINE)
    assert "export PATH=/shared/venv/bin:$PATH" in script
    assert "# Requeue a job whose time was up: training has saved (75)" in script
    (command,) = re.findall(r"^srun .*fdl_runner.*$", script, re.MULTILINE)
    assert command.rindex("--kill-on-bad-exit=0") > command.rindex("--kill-on-bad-exit=1"), "the last one counts"
    assert command.rindex(f"--chdir={tmp_path}") > command.index("--chdir ")


def test_torchrun_starts_the_ranks_of_this_machine(tmp_path):
    profile = {"kind": "local", "environment": {"PVS_TRY": "seen"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    executor = _executor("executor=pvs_profile(mine.yaml)", "executor.ntasks_per_node=2")
    executor.assign("id", str(tmp_path), "try", "try")
    (role,) = package("try", nemo_run.Partial(subprocess.getoutput, cmd="true"), executor).roles
    assert role.entrypoint == "torchrun"
    assert role.args[role.args.index("--nproc-per-node") + 1] == "2"
    assert role.env["PVS_TRY"] == "seen"
    here = Path(sys.executable).parent
    assert Path(shutil.which("torchrun", path=role.env["PATH"])).parent == here, "that of another environment"


def test_what_cannot_run_so_is_refused_with_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PVS_IMAGE", "/images/pvs.sqsh")
    with pytest.raises(UserError, match=r"is in none of the profile's container_mounts"):
        _executor("executor=pvs_slurm_h100")
    monkeypatch.setenv("PVS_SHARED", "/")
    assert _executor("executor=pvs_slurm_h100").container_image == "/images/pvs.sqsh"
    monkeypatch.setenv("PVS_PYTHON", "/shared/venv/bin/python")
    with pytest.raises(UserError, match=r"the nemo command starts the container's own"):
        _executor("executor=pvs_slurm_h100")
    monkeypatch.delenv("SLURM_ACCOUNT")
    with pytest.raises(UserError, match="needs the variable SLURM_ACCOUNT"):
        _executor("executor=pvs_slurm_h100")
    with pytest.raises(UserError, match="There is no launch profile nowhere"):
        _executor("executor=pvs_profile(nowhere)")
