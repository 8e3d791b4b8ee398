"""What a user asks to have measured: presets, tasks, texts, and how texts are cut. Imports no lm-eval."""

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
    """One task as a user asked for it."""

    task: str
    """Name in lm-eval, or in the folder."""
    shots: int | None = None
    """Examples in the prompt; None for the task's own number."""
    metric: str | None = None
    """The one to report; None for all."""
    folder: Path | None = None
    """Folder whose YAML file defines it."""


@dataclass(frozen=True)
class Preset:
    """What ``presets.yaml`` says of one name."""

    tasks: dict[str, str]
    """Task and the metric to report."""
    perplexity: list[str]
    samples: int
    sequence_length: int


def presets() -> dict[str, Preset]:
    """Return the presets by name."""
    text = resources.files("nemo_pvs.evaluation").joinpath("presets.yaml").read_text()
    return {name: Preset(**values) for name, values in yaml.safe_load(text).items()}


def parse_tasks(text: str) -> list[TaskRequest]:
    """Return what ``--tasks`` asks for: presets, folders, names with or without ``:shots``, a comma between them.

    Raises:
        UserError: a number of shots is none, or a folder defines no task.
    """
    requests: list[TaskRequest] = []
    items = [item.strip() for item in text.split(",") if item.strip()]
    of_folders = [request for item in items if Path(item).is_dir() for request in _tasks_of_folder(Path(item))]
    defined = {request.task: request.folder for request in of_folders}
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
    names = [about["task"] for about in _definitions(folder).values()]
    if not names:
        raise UserError(f"{folder} has no .yaml file with a task: line; write one as lm-eval's task guide explains.")
    return [TaskRequest(name, folder=folder) for name in names]


def _definitions(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the task definitions in a folder; functions in them (``!function``) are not loaded here."""
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        about = read_yaml(path, PlainLoader)
        if isinstance(about, dict) and isinstance(about.get("task"), str):
            found[path] = about
    return found


class PlainLoader(yaml.SafeLoader):
    """Reads ``!function module.name`` as nothing."""


PlainLoader.add_constructor("!function", lambda loader, node: None)


@dataclass(frozen=True)
class EvaluationRequest:
    """All that one command measures of each checkpoint."""

    tasks: Sequence[TaskRequest]
    texts: Sequence[str]
    presets: Sequence[str]
    """Names of the presets among the tasks, whose averages are reported."""
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
        """Return what the options of ``pvs evaluate`` ask for.

        Without tasks and texts it is the perplexity of the Wikipedia sample; a preset brings its own texts and sizes
        of windows unless others are given; the text ``none`` asks for none.

        Raises:
            UserError: as ``parse_tasks``.
        """
        wanted = parse_tasks(tasks) if tasks is not None else []
        named = [name for name in presets() if tasks is not None and name in map(str.strip, tasks.split(","))]
        preset = presets()[named[0]] if named else None
        if texts is None:
            texts = preset.perplexity if preset else [] if wanted else [_TEXT]
        return cls(
            wanted,
            [text for text in dict.fromkeys(texts) if text != "none"],
            named,
            (preset.samples if preset else _SAMPLES) if samples is None else samples,
            (preset.sequence_length if preset else _SEQUENCE_LENGTH) if sequence_length is None else sequence_length,
            stride,
            train_split,
        )

    def averages(self, measured: Measured) -> Measured:
        """Return the mean over the tasks of each preset, as ``paper/average``."""
        found = {
            f"{name}/average": average(
                measured, [f"{task}/0-shot/{metric}" for task, metric in presets()[name].tasks.items()]
            )
            for name in self.presets
        }
        return {name: value for name, value in found.items() if value is not None}
