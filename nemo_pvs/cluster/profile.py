"""Launch profiles (``launch/*.yaml``): where the processes of a run start, and NeMo-Run's executors for that."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.fields import Block, Parallelism, Positive
from nemo_pvs.recipe.problems import first_problem
from nemo_pvs.system.files import expand_home, read_yaml
from nemo_pvs.training.preemption import PREEMPTED

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Profile(Block):
    python: str
    """Interpreter that nemo_pvs is installed in, where the stages run."""
    environment: dict[str, str] = Field(default={})
    """Variables of every process."""


class LocalProfile(_Profile):
    """This machine, or the one that a person is logged in to."""

    kind: Literal["local"]
    python: str = sys.executable

    def executor(self, layout: Parallelism | None, folder: Path) -> Any:
        """Return NeMo-Run's executor of a stage; the ranks of a training are started by its command."""
        import nemo_run as run

        return run.LocalExecutor(env_vars=dict(self.environment))

    def function_executor(self, folder: Path) -> Any:
        """Return NeMo-Run's executor of a function that every rank calls: one a GPU, or one; torchrun starts them."""
        import nemo_run as run
        import torch

        return run.LocalExecutor(
            ntasks_per_node=max(1, torch.cuda.device_count()),
            launcher="torchrun",
            env_vars={"PATH": f"{Path(self.python).parent}:{os.environ.get('PATH', '')}", **self.environment},
        )

    def training(self, job: Path) -> list[str]:
        """Return the arguments of ``python -m nemo_pvs.megatron.launch``."""
        return [str(job)]


class SlurmProfile(_Profile):
    """A Slurm cluster, with a container (Pyxis) or an environment that all nodes see."""

    kind: Literal["slurm"]
    python: str = "python"
    account: str
    partition: str | None = None
    time: str = "04:00:00"
    """Limit of one allocation; a run that needs longer is requeued."""
    gpus_per_node: Positive = 8
    requeues: Annotated[int, Field(ge=0)] = 100
    """How often a stage that reached its limit or was preempted is queued again, and goes on."""
    failures: Annotated[int, Field(ge=0)] = 2
    """How often it is queued again after it has failed; what a user has to mend (exit code 2) never is."""
    seconds_to_save: Positive = 300
    """How long before the limit the ranks are told: a step, a validation and a save must fit."""
    container_image: str | None = None
    container_mounts: list[str] = Field(default=[])
    """``host:container``; the run folder must be visible under the same path in both."""
    srun_args: list[str] = Field(default=[])
    sbatch: dict[str, Any] = Field(default={})
    """More options of sbatch: ``qos: high``."""
    host: str | None = None
    """Login node to submit from, by ssh; None where sbatch is here."""
    user: str | None = None

    def executor(self, layout: Parallelism | None, folder: Path) -> Any:
        """Return NeMo-Run's executor: one task a GPU for a training, one task on one node for all other stages."""
        import nemo_run as run

        from nemo_pvs.cluster.slurm_tunnel import JobFreeTunnel

        ranks = layout.processes if layout else 1
        here = min(ranks, self.gpus_per_node)
        if ranks % here:
            raise UserError(f"{ranks} ranks do not fill nodes of {self.gpus_per_node} GPUs; change data_parallel.")
        # Relative paths of a recipe mean what they mean here; NeMo-Run would start in a folder of its own.
        work = "--container-workdir" if self.container_image else "--chdir"
        for path in (folder, Path.cwd()):
            self._check_mounted(path)
        jobs = str(folder / "slurm")
        tunnel = (
            run.SSHTunnel(host=self.host, user=self.user or os.environ.get("USER", ""), job_dir=jobs)
            if self.host
            else JobFreeTunnel(job_dir=jobs)
        )
        return run.SlurmExecutor(
            account=self.account,
            partition=self.partition,
            time=self.time,
            nodes=ranks // here,
            ntasks_per_node=here,
            gpus_per_node=here if layout else self.gpus_per_node,
            exclusive=True,
            mem="0",  # all of the node
            signal=f"USR1@{self.seconds_to_save}",
            container_image=self.container_image or None,
            container_mounts=list(self.container_mounts),
            # NeMo-Run's --kill-on-bad-exit would let the first rank that has saved take down those that are at it.
            srun_args=["--wait=120", "--kill-on-bad-exit=0", f"{work}={Path.cwd()}", *self.srun_args],
            setup_lines=_requeue_only(self.failures, jobs),
            additional_parameters={"requeue": True, **self.sbatch},
            env_vars={"MASTER_ADDR": "$head_node_ip", "MASTER_PORT": "29500", **self.environment},
            retries=self.requeues,
            tunnel=tunnel,
            packager=run.Packager(),  # nemo_pvs is installed where it runs
        )

    def function_executor(self, folder: Path) -> Any:
        """Return NeMo-Run's executor of a function that every rank calls: srun starts one a GPU, on one node."""
        executor = self.executor(Parallelism(data_parallel=self.gpus_per_node), folder)
        if os.sep in self.python:
            # NeMo-Run starts functions with whatever python comes first.
            if self.container_image:
                raise UserError(
                    f"The profile's python is {self.python}, but under nemo the container's own is started; leave "
                    "python (PVS_PYTHON) out, and take an image that nemo_pvs is installed in."
                )
            executor.env_vars["PATH"] = f"{Path(self.python).parent}:$PATH"
        return executor

    def training(self, job: Path) -> list[str]:
        """Return the arguments of ``python -m nemo_pvs.megatron.launch``, which srun starts once a rank."""
        return ["--slurm", str(job)]

    def _check_mounted(self, folder: Path) -> None:
        if not self.container_image:
            return
        mounts = [mount.split(":") for mount in self.container_mounts]
        same = [Path(mount[0]) for mount in mounts if mount[0] == mount[min(1, len(mount) - 1)]]
        if not any(folder.is_relative_to(mount) for mount in same):
            raise UserError(
                f"{folder} is in none of the profile's container_mounts under its own path; add {folder}:{folder}."
            )


Profile = Annotated[LocalProfile | SlurmProfile, Field(discriminator="kind")]


def packaged_profiles() -> list[str]:
    """Return the names of the profiles that come with the package."""
    folder = Path(str(resources.files("nemo_pvs.launch")))
    return sorted(file.stem for file in folder.glob("*.yaml"))


def load_profile(name_or_path: str, environment: Mapping[str, str] = os.environ) -> LocalProfile | SlurmProfile:
    """Read a profile by path (``my/cluster.yaml``) or by the name of a packaged one (``slurm_h100``).

    ``${NAME}`` stands for a variable of the environment, ``${NAME:-value}`` for one that may be unset.

    Raises:
        UserError: there is no such profile, it says something that a profile cannot say, or a variable is not set.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = Path(str(resources.files("nemo_pvs.launch").joinpath(f"{name_or_path}.yaml")))
    if not path.is_file():
        raise UserError(f"There is no launch profile {name_or_path}; known names: {', '.join(packaged_profiles())}.")
    values = expand_home(_substituted(read_yaml(path), environment, str(path)))
    try:
        profile: LocalProfile | SlurmProfile = TypeAdapter(Profile).validate_python(values)
    except ValidationError as error:
        kind = values.get("kind") if isinstance(values, Mapping) else None
        block = LocalProfile if kind == "local" else SlurmProfile
        raise UserError(f"{path}: {first_problem(error, block)}") from None
    return profile


def _requeue_only(failures: int, folder: str) -> str:
    """Return bash that keeps NeMo-Run's batch script, which requeues whatever has gone wrong, from wasting nodes.

    The script calls ``scontrol requeue`` when ``exitcode`` is not 0; a function of that name comes before the program.
    """
    return f"""
# Queued again: what has saved because its time was up ({PREEMPTED}), and {failures} times what has failed otherwise.
scontrol() {{
  if [ "$1" = requeue ] && [ "$exitcode" -ne {PREEMPTED} ]; then
    failed={shlex.quote(folder)}/failures-$SLURM_JOB_ID
    echo "$exitcode" >> "$failed"
    if [ "$exitcode" -eq 2 ] || [ "$(wc -l < "$failed")" -gt {failures} ]; then
      echo "not queued again: exit code $exitcode"
      return 0
    fi
  fi
  command scontrol "$@"
}}
"""


def _substituted(value: Any, environment: Mapping[str, str], where: str) -> Any:
    """Return a profile's values with variables replaced; an entry of a list that becomes empty is left out."""
    if isinstance(value, Mapping):
        return {key: _substituted(entry, environment, where) for key, entry in value.items()}
    if isinstance(value, list):
        entries = [_substituted(entry, environment, where) for entry in value]
        return [entry for entry in entries if entry != ""]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        name, default = found.groups()
        text = environment.get(name, default)
        if text is None:
            raise UserError(
                f"{where} needs the variable {name}; set it, or copy the profile and write the value in it."
            )
        return text

    return _VARIABLE.sub(replace, value)
