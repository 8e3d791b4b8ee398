"""What a user requests to measure: presets, tasks, texts, and the size of their windows. Does not import lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.summary import MeasuredMetrics, average
from nemo_pvs.evaluation.texts import check_windows
from nemo_pvs.recipe.blocks import RecoveryMeasures
from nemo_pvs.system.files import read_yaml

_SAMPLES = 64
_SEQUENCE_LENGTH = 512
_TEXT = "wikipedia-sample"


@dataclass(frozen=True)
class TaskRequest:
    """One task as a user requested it."""

    task: str
    """Task name in lm-eval, or in ``folder``."""
    shots: int | None = None
    """Number of examples in the prompt; None for the task's default."""
    metric: str | None = None
    """The metric to report; None for all."""
    folder: Path | None = None
    """Folder with the YAML file that defines the task; None for lm-eval's own tasks."""
    data_set: str | None = None
    """``owner/name`` of its data set, without which the task is left out; None to refuse a task without data."""


@dataclass(frozen=True)
class TaskPreset:
    """One preset of ``presets.yaml``."""

    tasks: dict[str, str]
    """The metric to report, by task, with ``:shots`` unless there are none."""
    perplexity: list[str]
    samples: int
    sequence_length: int
    data: dict[str, str] = field(default_factory=dict)
    """The data sets of tasks that are left out where these have not been downloaded; there is no average then."""
    recovery: RecoveryMeasures | None = None
    """Also take the measures that need no data set."""

    @property
    def requests(self) -> list[TaskRequest]:
        """The tasks."""
        requests = []
        for item, metric in self.tasks.items():
            name, _, shots = item.partition(":")
            requests.append(TaskRequest(name, int(shots or 0), metric, data_set=self.data.get(name)))
        return requests


def task_presets() -> dict[str, TaskPreset]:
    """Return the presets by name."""
    text = resources.files("nemo_pvs.evaluation").joinpath("presets.yaml").read_text()
    named = {}
    for name, values in yaml.safe_load(text).items():
        sizes = values.pop("recovery", None)
        named[name] = TaskPreset(**values, recovery=sizes and RecoveryMeasures(**sizes))
    return named


def parse_tasks(text: str) -> list[TaskRequest]:
    """Parse ``--tasks``: presets, folders, and task names with or without ``:shots``, separated by commas.

    Raises:
        UserError: a number of shots is not a number, a folder defines no task, or there is no task at all.
    """
    requests: list[TaskRequest] = []
    items = [item.strip() for item in text.split(",") if item.strip()]
    defined: dict[str, Path | None] = {}
    for item in items:
        if Path(item).is_dir():
            defined.update({request.task: request.folder for request in _tasks_of_folder(Path(item))})
    for item in items:
        if item in task_presets():
            requests += task_presets()[item].requests
        elif Path(item).is_dir():
            requests += _tasks_of_folder(Path(item))
        else:
            name, _, shots = item.partition(":")
            if shots and not shots.isdecimal():
                raise UserError(f"--tasks has {item!r}; write the number of shots as {name}:5.")
            requests.append(TaskRequest(name, int(shots) if shots else None, folder=defined.get(name)))
    if not requests:
        raise UserError(
            "--tasks names no task; give paper, recovery, names such as arc_easy,winogrande:5, or a folder."
        )
    return list(dict.fromkeys(requests))


def left_out(requests: Sequence[TaskRequest], data: Path) -> dict[TaskRequest, str]:
    """Return the requests with a ``data_set`` that is not here, each with the reason and the download command.

    Args:
        requests: The requested tasks.
        data: Folder of downloaded data sets.
    """
    missing = {}
    for request in requests:
        if request.data_set and not (data / request.data_set).is_dir():
            missing[request] = f"its data are not here; {download(request.data_set, data / request.data_set)}"
    return missing


def download(repository: str, local: Path) -> str:
    """Return advice on how to get a data set."""
    return f"run hf download {repository} --repo-type dataset --local-dir {local} on a machine with network access"


def _tasks_of_folder(folder: Path) -> list[TaskRequest]:
    names = [definition["task"] for definition in _definitions(folder).values()]
    if not names:
        raise UserError(f"{folder} has no .yaml file with a task: line; write one as lm-eval's task guide explains.")
    return [TaskRequest(name, folder=folder) for name in names]


def _definitions(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the task definitions in a folder by file; functions in them (``!function``) are not loaded."""
    definitions = {}
    for path in sorted(folder.rglob("*.yaml")):
        definition = read_yaml(path, PlainLoader)
        if isinstance(definition, dict) and isinstance(definition.get("task"), str):
            definitions[path] = definition
    return definitions


class PlainLoader(yaml.SafeLoader):
    """A YAML loader that reads ``!function module.name`` as None."""


PlainLoader.add_constructor("!function", lambda loader, node: None)


@dataclass(frozen=True)
class EvaluationRequest:
    """Everything that one command measures for each checkpoint."""

    tasks: Sequence[TaskRequest]
    texts: Sequence[str]
    presets: Sequence[str]
    """Names of the presets that were requested; their averages are reported."""
    samples: int
    sequence_length: int
    stride: int | None = None
    train_split: bool = False
    recovery: RecoveryMeasures | None = None
    """Sizes of the measures that need no data set; None to leave them out."""

    @classmethod
    def parse(
        cls,
        tasks: str | None,
        texts: Sequence[str] | None,
        *,
        samples: int | None = None,
        sequence_length: int | None = None,
        stride: int | None = None,
        train_split: bool = False,
    ) -> EvaluationRequest:
        """Parse the options of ``pvs evaluate``.

        Without tasks and texts this is the perplexity of the Wikipedia sample. A preset includes texts and window
        sizes, unless others are given. The text ``none`` stands for no text.

        Raises:
            UserError: as ``parse_tasks``, the sizes of windows are invalid, or nothing is to be measured.
        """
        task_requests = parse_tasks(tasks) if tasks is not None else []
        named = [name for name in task_presets() if tasks is not None and name in map(str.strip, tasks.split(","))]
        preset = task_presets()[named[0]] if named else None
        if texts is None:
            texts = preset.perplexity if preset else [] if task_requests else [_TEXT]
        elif not task_requests and set(texts) <= {"none"}:
            raise UserError("--perplexity none leaves nothing to measure; add --tasks, or name a text.")
        if samples is None:
            samples = preset.samples if preset else _SAMPLES
        if sequence_length is None:
            sequence_length = preset.sequence_length if preset else _SEQUENCE_LENGTH
        check_windows(samples, sequence_length, stride)
        return cls(
            task_requests,
            [text for text in dict.fromkeys(texts) if text != "none"],
            named,
            samples,
            sequence_length,
            stride,
            train_split,
            next((task_presets()[name].recovery for name in named if task_presets()[name].recovery), None),
        )

    def averages(self, measured: MeasuredMetrics) -> MeasuredMetrics:
        """Return the mean over the tasks of each preset, as ``paper/average``."""
        averages = {}
        for name in self.presets:
            preset = task_presets()[name]
            metrics = [f"{task}/0-shot/{metric}" for task, metric in preset.tasks.items()]
            value = None if preset.data else average(measured, metrics)
            if value is not None:
                averages[f"{name}/average"] = value
        return averages
