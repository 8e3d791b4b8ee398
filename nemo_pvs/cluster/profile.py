"""Launch profiles (``launch/*.yaml``): where the processes of a run start, and NeMo-Run's executors for them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.fields import Parallelism, Positive, RecipeBlock
from nemo_pvs.recipe.problems import first_problem
from nemo_pvs.system.files import StrictLoader, expand_home, read_yaml
from nemo_pvs.system.gpu_environment import GPU_ENVIRONMENT
from nemo_pvs.training.preemption import PREEMPTED, USER_ERROR_FILE

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")

_EXTENSIONS = "TORCH_EXTENSIONS_DIR"
"""Where Megatron compiles if NeMo's command imports it before our code can prevent that (``import_megatron``).

It is on the node, and new for each attempt: a rank that is killed while it compiles leaves a lock that blocks others.
"""

_WARNING = signal.SIGUSR1
_SIGNALLED = (128 + _WARNING, 128 + signal.SIGTERM)
"""What srun exits with if the warning before the time limit, or a preemption, has ended a task."""


def _text(value: Any) -> Any:
    """Refuse a number: YAML reads 24:00:00 as 86400."""
    if isinstance(value, int):
        raise ValueError(f"is the number {value} in YAML; write it in quotes")
    return value


class _Profile(RecipeBlock):
    python: str
    """Python interpreter with nemo_pvs, on the machine where the stages run."""
    environment: dict[str, str] = Field(default={})
    """More environment variables of every process; they take precedence over ``GPU_ENVIRONMENT``."""

    @property
    def variables(self) -> dict[str, str]:
        """All environment variables that processes are started with."""
        return {**GPU_ENVIRONMENT, **self.environment}


class LocalProfile(_Profile):
    """This machine."""

    kind: Literal["local"]
    python: str = sys.executable

    def executor(self, layout: Parallelism | None, folder: Path) -> Any:
        """Return NeMo-Run's executor for a stage, whose command starts the ranks of a training itself."""
        import nemo_run as run

        return run.LocalExecutor(env_vars=self.variables)

    def function_executor(self, folder: Path) -> Any:
        """Return NeMo-Run's executor for a function on every rank: torchrun starts one per GPU, or a single one."""
        import nemo_run as run
        import torch

        return run.LocalExecutor(
            ntasks_per_node=max(1, torch.cuda.device_count()),
            launcher="torchrun",
            env_vars={
                "PATH": f"{Path(self.python).parent}:{os.environ.get('PATH', '')}",
                _EXTENSIONS: f"{tempfile.gettempdir()}/torch_extensions-{os.getpid()}",
                **self.variables,
            },
        )

    def training(self, job: Path) -> list[str]:
        """Return the arguments of ``python -m nemo_pvs.megatron.launch``."""
        return [str(job)]


class SlurmProfile(_Profile):
    """A Slurm cluster, with a container (Pyxis) or a Python environment that all nodes can access."""

    kind: Literal["slurm"]
    python: str = "python"
    account: Annotated[str, BeforeValidator(_text)]
    partition: str | None = None
    time: Annotated[str, BeforeValidator(_text)] = "04:00:00"
    """Time limit of one allocation; a run that needs longer is requeued."""
    gpus_per_node: Positive = 8
    requeues: Annotated[int, Field(ge=0)] = 100
    """How often a stage that reached its time limit or was preempted is requeued to resume."""
    failures: Annotated[int, Field(ge=0)] = 2
    """How often a stage is requeued after a failure; never after one that a user has to fix (exit code 2)."""
    seconds_to_save: Positive = 300
    """Seconds before the time limit at which ranks are signalled; enough for a step, a validation and a save."""
    container_image: str | None = None
    container_mounts: list[str] = Field(default=[])
    """``host:container``; the run folder must be visible under the same path in both."""
    srun_args: list[str] = Field(default=[])
    sbatch: dict[str, Any] = Field(default={})
    """More options of sbatch, such as ``qos: high``."""
    host: str | None = None
    """Login node to submit from, by ssh; None if this machine has sbatch."""
    user: str | None = None

    def executor(self, layout: Parallelism | None, folder: Path) -> Any:
        """Return NeMo-Run's executor: one task per GPU for a training, one task on one node for all other stages.

        Raises:
            UserError: the ranks do not fill whole nodes, or a container would not see the folder.
        """
        import nemo_run as run

        from nemo_pvs.cluster.slurm_tunnel import JobFreeTunnel

        ranks = layout.processes if layout else 1
        per_node = min(ranks, self.gpus_per_node)
        if ranks % per_node:
            raise UserError(
                f"{ranks} ranks do not fill whole nodes of {self.gpus_per_node} GPUs; change data_parallel."
            )
        here = Path.cwd()
        for path in (folder, here):
            self.check_mounted(path)
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
            nodes=ranks // per_node,
            ntasks_per_node=per_node,
            gpus_per_node=per_node if layout else self.gpus_per_node,
            exclusive=True,
            mem="0",  # all memory of the node
            signal=f"{_WARNING.name.removeprefix('SIG')}@{self.seconds_to_save}",
            container_image=self.container_image or None,
            container_mounts=list(self.container_mounts),
            container_env=sorted(name.upper() for name in self.variables),  # otherwise the image's own values win
            # With NeMo-Run's --kill-on-bad-exit, the first rank that has saved would kill those that are still saving.
            # And a recipe's relative paths must mean the same in the job; NeMo-Run would start it in its own folder.
            srun_args=[
                "--wait=120",
                "--kill-on-bad-exit=0",
                *([] if self.container_image else [f"--chdir={here}"]),
                *self.srun_args,
            ],
            setup_lines=_requeue_only(self.failures, jobs) + (_start_in(here) if self.container_image else ""),
            additional_parameters={"requeue": True, "kill_on_invalid_dep": "yes", **self.sbatch},
            # Not NeMo-Run's $head_node_ip, from hostname --ip-address: that is all addresses of a host with several,
            # and 127.0.1.1 where /etc/hosts says so, as Debian and Ubuntu write it.
            env_vars={
                "MASTER_ADDR": "$head_node",
                "MASTER_PORT": "29500",
                **{name: _in_bash(value) for name, value in self.variables.items()},
            },
            retries=self.requeues,
            tunnel=tunnel,
            packager=run.Packager(),  # no code is copied: nemo_pvs is installed where it runs
        )

    def function_executor(self, folder: Path) -> Any:
        """Return NeMo-Run's executor for a function on every rank: srun starts one per GPU, on one node.

        Raises:
            UserError: the profile sets both ``python`` and a container, or as ``executor``.
        """
        executor = self.executor(Parallelism(data_parallel=self.gpus_per_node), folder)
        attempt = "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        executor.env_vars = {_EXTENSIONS: f"${{TMPDIR:-/tmp}}/torch_extensions-{attempt}", **executor.env_vars}
        if os.sep in self.python:
            # NeMo-Run starts functions with the first python in PATH.
            if self.container_image:
                raise UserError(
                    f"The profile's python is {self.python}, but the nemo command starts the container's own; leave "
                    "python (PVS_PYTHON) out, and use an image in which nemo_pvs is installed."
                )
            executor.env_vars["PATH"] = f"{Path(self.python).parent}:$PATH"
        return executor

    def training(self, job: Path) -> list[str]:
        """Return the arguments of ``python -m nemo_pvs.megatron.launch``, which srun starts once per rank."""
        return ["--slurm", str(job)]

    def check_mounted(self, path: Path) -> None:
        """Refuse a path that jobs do not see under its own name.

        Raises:
            UserError: it is not in the container.
        """
        if not self.container_image:
            return
        mounts = [mount.split(":") for mount in self.container_mounts]
        same = [Path(mount[0]) for mount in mounts if mount[0] == mount[min(1, len(mount) - 1)]]
        if not any(path.is_relative_to(mount) for mount in same):
            raise UserError(
                f"{path} is in none of the profile's container_mounts under its own path; add {path}:{path}."
            )


Profile = Annotated[LocalProfile | SlurmProfile, Field(discriminator="kind")]


def packaged_profiles() -> list[str]:
    """Return the names of the profiles that come with the package."""
    folder = Path(str(resources.files("nemo_pvs.launch")))
    return sorted(file.stem for file in folder.glob("*.yaml"))


def load_profile(name_or_path: str, environment: Mapping[str, str] = os.environ) -> LocalProfile | SlurmProfile:
    """Read a profile by path (``my/cluster.yaml``) or by the name of a packaged one (``slurm_h100``).

    ``${NAME}`` is replaced by an environment variable, ``${NAME:-value}`` by one that may be unset.

    Raises:
        UserError: there is no such profile, it has an invalid key or value, or a variable is not set.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = Path(str(resources.files("nemo_pvs.launch").joinpath(f"{name_or_path}.yaml")))
    if not path.is_file():
        raise UserError(
            f"There is no launch profile {name_or_path}; give the path of a YAML file or one of "
            f"{', '.join(packaged_profiles())}."
        )
    values = expand_home(_substituted(read_yaml(path, StrictLoader), environment, str(path)))
    try:
        profile: LocalProfile | SlurmProfile = TypeAdapter(Profile).validate_python(values)
    except ValidationError as error:
        kind = values.get("kind") if isinstance(values, Mapping) else None
        block = LocalProfile if kind == "local" else SlurmProfile
        raise UserError(f"{path}: {first_problem(error, block)}") from None
    return profile


def _requeue_only(failures: int, folder: str) -> str:
    """Return bash code that keeps NeMo-Run's batch script from requeuing a job after every failure.

    The script calls ``scontrol requeue`` whenever ``exitcode`` is not 0; a bash function of this name shadows the
    program. A stage that does not train has nothing to save: the signal before the time limit ends it, and the next
    attempt finds what is finished.
    """
    signalled = " or ".join(map(str, _SIGNALLED))
    signals = " ".join(f'&& [ "$exitcode" -ne {code} ]' for code in (PREEMPTED, *_SIGNALLED))
    return f"""
# Requeue a job whose time was up: training has saved ({PREEMPTED}), and anything else was ended by the signal
# ({signalled}). After other failures at most {failures} times, and never after one that a user has to fix (2).
export {USER_ERROR_FILE}={shlex.quote(folder)}/user-error-$SLURM_JOB_ID
rm -f "${USER_ERROR_FILE}"
scontrol() {{
  if [ "$1" = requeue ] {signals}; then
    failed={shlex.quote(folder)}/failures-$SLURM_JOB_ID
    echo "$exitcode" >> "$failed"
    if [ "$exitcode" -eq 2 ] || [ -e "${USER_ERROR_FILE}" ] || [ "$(wc -l < "$failed")" -gt {failures} ]; then
      echo "not requeued: exit code $exitcode"
      return 0
    fi
  fi
  command scontrol "$@"
}}
"""


def _in_bash(value: str) -> str:
    """Return a value as NeMo-Run's batch script needs it in ``export NAME=value``; variables in it are replaced."""
    return value if re.fullmatch(r"[\w./:,=+$-]*", value) else '"' + re.sub(r'(["\\`])', r"\\\1", value) + '"'


def _start_in(folder: Path) -> str:
    """Return bash code that has srun start tasks in a folder of the container, instead of NeMo-Run's own.

    NeMo-Run always gives ``--container-workdir /nemo_run/code``, and Pyxis refuses a second one; so a bash function of
    srun's name changes it.
    """
    return f"""
# Start where the command was given, not in NeMo-Run's folder.
started_in={shlex.quote(str(folder))}
srun() {{
  command srun "${{@/#"/nemo_run/code"/"$started_in"}}"
}}
"""


def _substituted(value: Any, environment: Mapping[str, str], where: str) -> Any:
    """Return a profile's values with variables replaced; list entries that become empty are left out."""
    if isinstance(value, Mapping):
        return {key: _substituted(entry, environment, where) for key, entry in value.items()}
    if isinstance(value, list):
        entries = [_substituted(entry, environment, where) for entry in value]
        return [entry for entry in entries if entry != ""]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        text = environment.get(name, default)
        if text is None:
            raise UserError(
                f"{where} needs the variable {name}; set it, or copy the profile and write the value into it."
            )
        return text

    return _VARIABLE.sub(replace, value)
