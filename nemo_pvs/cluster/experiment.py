"""Run a recipe's stages with NeMo-Run, as a launch profile says: prepare, train every arm, evaluate and report.

Each stage is a command that a person could type. For a cluster they are one experiment: NeMo-Run's executors turn them
into batch scripts, submit these with their dependencies, and requeue them. On this machine each is one of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_pvs.cluster.profile import LocalProfile, SlurmProfile
from nemo_pvs.errors import TrainingError, UserError
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.series import PARENTS, phases
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.training.job import JOB_FILE


@dataclass(frozen=True)
class Command:
    """One command of a run, and the commands in ``after`` that must have succeeded before it starts."""

    name: str
    module: str
    arguments: list[str]
    after: list[str]
    layout: Parallelism | None = None
    """Parallelism of a training; None for all other stages, which are one process."""


def stages(recipe: Recipe, recipe_name: str, folder: Path, profile: LocalProfile | SlurmProfile) -> list[Command]:
    """Return the stages of ``pvs run`` as commands: prepare, train each arm, report.

    Mask learning comes before these, and so does the training between rounds of pruning: after the first
    rounds, then after the second, and so on, each prepared when the previous ones are done. A teacher whose answers
    are cached runs right before the arms. If the recipe trains its
    parent, sweeps learning rates or has several seeds, this is repeated for the parents, the sweep and all seeds.

    Args:
        recipe: The recipe.
        recipe_name: Its name in ``pvs run``: a packaged name or a path.
        folder: Run folder; every stage must see it under this absolute path.
        profile: Where to run; trainings run one after another on one machine, and at the same time on a cluster.

    Raises:
        UserError: a container would not see a file or folder that the recipe names.
    """
    from nemo_pvs.planning.cached_teacher import cached_ranges, teaching_layout
    from nemo_pvs.planning.dry_run import settled  # takes seconds; profiles are also read to list them
    from nemo_pvs.planning.learned import first_of_each_training
    from nemo_pvs.recipe.options import rounds_of

    if profile.kind == "slurm":
        _check_visible([recipe_name, *_texts(recipe.model_dump())], profile)
    folder = folder.resolve()
    name = str(Path(recipe_name).resolve()) if Path(recipe_name).suffix in (".yaml", ".yml") else recipe_name
    command = ["run", name, "--out", str(folder)]

    todo: list[Command] = []
    ends: list[str] = []

    def train(prepare: str, jobs: Mapping[str, tuple[Path, Parallelism]]) -> None:
        """Add a stage that prepares jobs, and a stage for each job."""
        todo.append(Command(prepare, "nemo_pvs.cli", [*command, "--prepare-only"], list(ends)))
        ends.clear()
        for stage, (job, layout) in jobs.items():
            after = prepare if profile.kind == "slurm" else todo[-1].name
            todo.append(Command(stage, "nemo_pvs.megatron.launch", profile.training(job), [after], layout))
            ends.append(stage)
        if profile.kind != "slurm":
            del ends[:-1]

    steps = phases(recipe, folder)
    for phase in steps:
        first = "" if phase is steps[-1] else _prefix(phase[0].folder, folder)
        prefixes = [_prefix(member.folder, folder) for member in phase]
        masks, teachers, arms = {}, {}, {}
        shares: dict[int, dict[str, tuple[Path, Parallelism]]] = {}
        for member, prefix in zip(phase, prefixes, strict=True):
            run, place = settled(member.recipe), member.folder
            for target_name, learned in first_of_each_training(run):
                job = place / "masks" / target_name / "run" / JOB_FILE
                masks[f"{prefix}masks-{target_name}"] = (job, learned.layout)
            for target_name, target in run.targets.items():
                for number in range(1, rounds_of(target)):
                    job = place / "train" / f"{target_name}-stages" / str(number) / JOB_FILE
                    shares.setdefault(number, {})[f"{prefix}train-{target_name}-stage-{number}"] = (job, target.layout)
            for number in range(1, len(cached_ranges(run)) + 1):
                job = place / "teacher" / str(number) / JOB_FILE
                teachers[f"{prefix}teach-{number}"] = (job, teaching_layout(run))
            for arm in run.runs:
                arms[f"{prefix}train-{arm.name}"] = (place / "train" / arm.name / JOB_FILE, arm.layout)
        if masks:
            train(f"{first}prepare-masks", masks)
        for number, jobs in sorted(shares.items()):
            train(f"{first}prepare-stage-{number}", jobs)
        if teachers:
            train(f"{first}prepare-teacher", teachers)
        train(f"{first}prepare", arms)
    return [*todo, Command("report", "nemo_pvs.cli", command, ends)]


def _check_visible(texts: Iterable[str], profile: SlurmProfile) -> None:
    """Refuse what exists here, but not in the jobs' container, where that would be noticed only after the queue.

    Raises:
        UserError: naming it.
    """
    for path in (Path(text) for text in texts if os.path.exists(text)):
        for name in (path.absolute(), path.resolve()):  # a link, and what it points to
            profile.check_mounted(name)


def _texts(values: Any) -> Iterator[str]:
    """Yield every text in a recipe's values: names, and paths of files and folders."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _texts(value)


def _prefix(member: Path, folder: Path) -> str:
    """Return what the names of a run's stages begin with in the series of ``folder``: ``seed-1-``, or nothing."""
    if member == folder:
        return ""
    of_series = folder in member.parents
    return "-".join(member.relative_to(folder if of_series else folder.parent / PARENTS).parts) + "-"


def scripts(todo: list[Command], title: str, folder: Path, profile: LocalProfile | SlurmProfile) -> dict[str, str]:
    """Return what would be submitted for each stage, by its name, without starting or writing anything.

    Raises:
        UserError: a run does not fill whole nodes of the profile, or a container would not see the folder.
    """
    if profile.kind == "local":
        return {stage.name: shlex.join(_command(stage, profile)) for stage in todo}
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
        _experiment(todo, title, folder, profile, scratch) as experiment,
    ):
        experiment.dryrun(log=False, delete_exp_dir=False)
        files = {stage.name: next(Path(scratch).rglob(f"{stage.name}_sbatch.sh")) for stage in todo}
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}


def launch(todo: list[Command], title: str, folder: Path, profile: LocalProfile | SlurmProfile) -> None:
    """Run the stages here and wait, or submit them all to the cluster and return.

    Raises:
        UserError: as ``scripts``, this machine has fewer GPUs than a stage has ranks, or another command is using the
            folder.
        TrainingError: a stage that ran here failed.
    """
    base = str(folder.resolve() / "nemo_run")
    if profile.kind == "slurm":
        # No lock here: the first job may start and take it while the others are still being submitted.
        with _experiment(todo, title, folder, profile, base) as experiment:
            experiment.run(detach=True)
        return
    _check_gpus_here(todo)
    # An experiment for each stage: on one machine NeMo-Run starts a stage even if those before it have failed.
    with locked_folder(folder):
        for stage in todo:
            with _experiment([replace(stage, after=[])], f"{title}-{stage.name}", folder, profile, base) as experiment:
                experiment.run(detach=False)
            if str(experiment.status(return_dict=True)[stage.name]["status"]) != "SUCCEEDED":
                raise TrainingError(f"Stage {stage.name} failed; its output is under {folder / 'nemo_run'}.")


def check_submission(recipe: Recipe, folder: Path, profile: SlurmProfile) -> None:
    """Refuse before the queue what the jobs would refuse after it, when those that depend on them wait in vain.

    Raises:
        UserError: a dry run refuses the recipe, or jobs would not find the parent's weights.
    """
    from nemo_pvs.checkpoints.fetch import SMOLLM2, is_gguf, needs_network
    from nemo_pvs.planning.dry_run import dry_run

    source = recipe.parent.source
    if recipe.parent.normal_config is not None or source is None or Path(source).is_dir():  # its sizes are known here
        for phase in phases(recipe, folder):
            dry_run(phase[0].recipe)
    if source is None or profile.host is not None or source == SMOLLM2 or is_gguf(source) or Path(source).is_dir():
        return
    if not source.startswith("hf://"):
        raise UserError(f"The parent {source} does not exist yet; submit this when the run that makes it has ended.")
    fetched = folder / "parent"  # by an earlier attempt
    if profile.variables.get("HF_HUB_OFFLINE") == "1" and not fetched.exists() and needs_network(source):
        name = source.removeprefix("hf://").partition("@")[0]
        raise UserError(
            f"The jobs have no network (HF_HUB_OFFLINE of the profile) to download {source}; run hf download {name} "
            f"--local-dir hf/{Path(name).name}, and give that folder as parent.source of a recipe that extends this."
        )


def _check_gpus_here(todo: list[Command]) -> None:
    import torch

    from nemo_pvs.training.machine import check_gpus

    for stage in todo:
        if stage.layout and torch.cuda.is_available():
            check_gpus(stage.name, stage.layout, torch.cuda.device_count())


def _experiment(todo: list[Command], title: str, folder: Path, profile: LocalProfile | SlurmProfile, base: str) -> Any:
    import nemo_run as run

    experiment = run.Experiment(title, base_dir=base, log_level="WARNING")
    with experiment:
        for stage in todo:
            python, *_ = command = _command(stage, profile)
            arguments = [shlex.quote(argument) for argument in command[3:]]
            executor = profile.executor(stage.layout, folder.resolve())
            if profile.kind == "slurm":
                executor.job_name_prefix = f"{title}-"  # squeue shows it
            experiment.add(
                run.Script(path=stage.module, m=True, entrypoint=python, args=arguments),
                executor=executor,
                name=stage.name,
                dependencies=stage.after,
            )
    return experiment


def _command(stage: Command, profile: LocalProfile | SlurmProfile) -> list[str]:
    return [profile.python, "-m", stage.module, *stage.arguments]
