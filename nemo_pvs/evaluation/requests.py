"""What a user requests to measure: presets, tasks, texts, and the size of their windows. Does not import lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.summary import Measured, average
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


@dataclass(frozen=True)
class Preset:
    """One preset of ``presets.yaml``."""

    tasks: dict[str, str]
    """The metric to report, by task."""
    perplexity: list[str]
    samples: int
    sequence_length: int


def presets() -> dict[str, Preset]:
    """Return the presets by name."""
    text = resources.files("nemo_pvs.evaluation").joinpath("presets.yaml").read_text()
    return {name: Preset(**values) for name, values in yaml.safe_load(text).items()}


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
        if item in presets():
            requests += [TaskRequest(task, 0, metric) for task, metric in presets()[item].tasks.items()]
        elif Path(item).is_dir():
            requests += _tasks_of_folder(Path(item))
        else:
            name, _, shots = item.partition(":")
            if shots and not shots.isdecimal():
                raise UserError(f"--tasks has {item!r}; write the number of shots as {name}:5.")
            requests.append(TaskRequest(name, int(shots) if shots else None, folder=defined.get(name)))
    if not requests:
        raise UserError("--tasks names no task; give paper, names such as arc_easy,winogrande:5, or a folder.")
    return list(dict.fromkeys(requests))


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
            UserError: as ``parse_tasks``.
        """
        task_requests = parse_tasks(tasks) if tasks is not None else []
        named = [name for name in presets() if tasks is not None and name in map(str.strip, tasks.split(","))]
        preset = presets()[named[0]] if named else None
        if texts is None:
            texts = preset.perplexity if preset else [] if task_requests else [_TEXT]
        return cls(
            task_requests,
            [text for text in dict.fromkeys(texts) if text != "none"],
            named,
            (preset.samples if preset else _SAMPLES) if samples is None else samples,
            (preset.sequence_length if preset else _SEQUENCE_LENGTH) if sequence_length is None else sequence_length,
            stride,
            train_split,
        )

    def averages(self, measured: Measured) -> Measured:
        """Return the mean over the tasks of each preset, as ``paper/average``."""
        averages = {}
        for name in self.presets:
            metrics = [f"{task}/0-shot/{metric}" for task, metric in presets()[name].tasks.items()]
            value = average(measured, metrics)
            if value is not None:
                averages[f"{name}/average"] = value
        return averages
