"""From a recipe and a launch profile to a NeMo-Run experiment: prepare, train every arm, evaluate and report.

A profile (``launch/*.yaml``) says where the processes of a run start. Each stage is a command that a person could
type; NeMo-Run's executors make batch scripts of them, submit those with their dependencies, and start them again.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nemo_pvs.errors import TrainingError, UserError
from nemo_pvs.recipe import Layout, Recipe

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    python: str
    """Interpreter that nemo_pvs is installed in, where the stages run."""
    environment: dict[str, str] = {}
    """Variables of every process."""


class LocalProfile(_Profile):
    """This machine, or the one that a person is logged in to."""

    kind: Literal["local"]
    python: str = sys.executable

    def executor(self, layout: Layout | None, folder: Path) -> Any:
        """Return NeMo-Run's executor of a stage; the ranks of a training are started by its command."""
        import nemo_run as run

        return run.LocalExecutor(env_vars=dict(self.environment))

    def training(self, job: Path) -> list[str]:
        """Return the arguments of ``python -m nemo_pvs.training.launch``."""
        return [str(job)]


class SlurmProfile(_Profile):
    """A Slurm cluster, with a container (Pyxis) or an environment that all nodes see."""

    kind: Literal["slurm"]
    python: str = "python"
    account: str
    partition: str | None = None
    time: str = "04:00:00"
    """Limit of one allocation; a run that needs longer is requeued."""
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    requeues: Annotated[int, Field(ge=0)] = 100
    """How often a stage that failed, was preempted or reached its limit is queued again; training resumes."""
    seconds_to_save: Annotated[int, Field(ge=1)] = 300
    """How long before the limit the ranks are told: a step, a validation and a save must fit."""
    container_image: str | None = None
    container_mounts: list[str] = []
    """``host:container``; the run folder must be visible under the same path in both."""
    srun_args: list[str] = []
    sbatch: dict[str, Any] = {}
    """More options of sbatch: ``qos: high``."""
    host: str | None = None
    """Login node to submit from, by ssh; None where sbatch is here."""
    user: str | None = None

    def executor(self, layout: Layout | None, folder: Path) -> Any:
        """Return NeMo-Run's executor: one task a GPU for a training, one task on one node for all other stages."""
        import nemo_run as run

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
            else run.LocalTunnel(job_dir=jobs)
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
            srun_args=[f"{work}={Path.cwd()}", *self.srun_args],
            additional_parameters={"requeue": True, **self.sbatch},
            env_vars={"MASTER_ADDR": "$head_node_ip", "MASTER_PORT": "29500", **self.environment},
            retries=self.requeues,
            tunnel=tunnel,
            packager=run.Packager(),  # nemo_pvs is installed where it runs
        )

    def training(self, job: Path) -> list[str]:
        """Return the arguments of ``python -m nemo_pvs.training.launch``, which srun starts once a rank."""
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
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    try:
        profile: LocalProfile | SlurmProfile = TypeAdapter(Profile).validate_python(
            _substituted(values, environment, str(path))
        )
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part not in ("local", "slurm"))
        raise UserError(f"{path}: {key or 'profile'}: {problem['msg']}.") from None
    return profile


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


@dataclass(frozen=True)
class Stage:
    """One command of a run, and what must have ended well before it starts."""

    name: str
    module: str
    arguments: list[str]
    after: list[str]
    layout: Layout | None = None
    """Of a training; all other stages are one process."""


def stages(recipe: Recipe, recipe_name: str, folder: Path, profile: LocalProfile | SlurmProfile) -> list[Stage]:
    """Return the stages of ``pvs run`` as commands: prepare, each arm, report; before that, masks that are learned.

    Args:
        recipe: The recipe.
        recipe_name: What ``pvs run`` calls it: a packaged name or a path.
        folder: Run folder; every stage must see it under this absolute path.
        profile: Where to run; trainings follow one another on one machine, and run at once on a cluster.
    """
    from nemo_pvs.dry_run import settled  # takes seconds; profiles are also read to list them
    from nemo_pvs.masks_stage import is_trained_first, stage_layout

    folder = folder.resolve()
    name = str(Path(recipe_name).resolve()) if Path(recipe_name).suffix in (".yaml", ".yml") else recipe_name
    command = ["run", name, "--out", str(folder)]
    recipe = settled(recipe)

    def trained(prepare: str, before: list[str], jobs: Mapping[str, tuple[Path, Layout]]) -> list[Stage]:
        """Return a stage that prepares, and one for each job."""
        made = [Stage(prepare, "nemo_pvs.cli", [*command, "--prepare-only"], before)]
        for stage, (job, layout) in jobs.items():
            after = made[0] if profile.kind == "slurm" else made[-1]
            made.append(Stage(stage, "nemo_pvs.training.launch", profile.training(job), [after.name], layout))
        return made

    def ends(made: list[Stage]) -> list[str]:
        return [stage.name for stage in made[1:]] if profile.kind == "slurm" else [made[-1].name]

    masks = {
        f"masks-{name}": (folder / "masks" / name / "run" / "job.json", stage_layout(target))
        for name, target in recipe.targets.items()
        if is_trained_first(target)
    }
    learned = trained("prepare-masks", [], masks) if masks else []
    arms = {f"train-{arm.name}": (folder / "train" / arm.name / "job.json", arm.layout) for arm in recipe.runs}
    made = trained("prepare", ends(learned) if learned else [], arms)
    return [*learned, *made, Stage("report", "nemo_pvs.cli", command, ends(made))]


def scripts(todo: list[Stage], title: str, folder: Path, profile: LocalProfile | SlurmProfile) -> dict[str, str]:
    """Return what would be submitted for each stage, by its name; nothing is started or left behind.

    Raises:
        UserError: a run does not fill the nodes of the profile, or a container would not see the folder.
    """
    if profile.kind == "local":
        return {stage.name: shlex.join(_command(stage, profile)) for stage in todo}
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
        _experiment(todo, title, folder, profile, scratch) as made,
    ):
        made.dryrun(log=False, delete_exp_dir=False)
        files = {stage.name: next(Path(scratch).rglob(f"{stage.name}_sbatch.sh")) for stage in todo}
        return {name: file.read_text() for name, file in files.items()}


def launch(todo: list[Stage], title: str, folder: Path, profile: LocalProfile | SlurmProfile) -> None:
    """Run the stages here and wait, or submit them all to the cluster and return.

    Raises:
        UserError: as ``scripts``.
        TrainingError: a stage that ran here failed.
    """
    with _experiment(todo, title, folder, profile, str(folder.resolve() / "nemo_run")) as made:
        made.run(detach=profile.kind == "slurm")
    if profile.kind == "slurm":
        return
    status = made.status(return_dict=True)
    failed = [stage.name for stage in todo if str(status[stage.name]["status"]) != "SUCCEEDED"]
    if failed:
        raise TrainingError(f"Stage {failed[0]} failed; its output is under {folder / 'nemo_run'}.")


def _experiment(todo: list[Stage], title: str, folder: Path, profile: LocalProfile | SlurmProfile, base: str) -> Any:
    import nemo_run as run

    made = run.Experiment(title, base_dir=base, log_level="WARNING")
    with made:
        for stage in todo:
            python, *_ = command = _command(stage, profile)
            made.add(
                run.Script(
                    path=stage.module, m=True, entrypoint=python, args=[shlex.quote(one) for one in command[3:]]
                ),
                executor=profile.executor(stage.layout, folder.resolve()),
                name=stage.name,
                dependencies=stage.after,
            )
    return made


def _command(stage: Stage, profile: LocalProfile | SlurmProfile) -> list[str]:
    return [profile.python, "-m", stage.module, *stage.arguments]
