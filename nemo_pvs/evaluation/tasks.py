"""Tasks of lm-eval: load the requested ones from local data, and measure them under unique names."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry

from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.generation_settings import GenerationSettings
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.offline import offline
from nemo_pvs.evaluation.requests import PlainLoader, TaskRequest, download
from nemo_pvs.system.files import read_yaml, sha256_file, sha256_json

# lm-eval's own seed for the choice of few-shot examples.
_FEWSHOT_SEED = 1234
# The metric code_eval of the package evaluate runs code only if this variable is 1.
_CODE_EVAL = "HF_ALLOW_CODE_EVAL"
_LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
# Where the data are stored does not change the questions.
_PLACES = ("dataset_path", "dataset_kwargs", "metadata")


@dataclass
class LoadedTask:
    """A task with its data."""

    request: TaskRequest
    task: Task
    name: str = field(init=False)
    """Name of its results, such as ``arc_challenge/25-shot``."""

    def __post_init__(self) -> None:
        """Set the name."""
        self.name = f"{self.task.config.task}/{self.task.config.num_fewshot}-shot"

    @property
    def generation(self) -> GenerationSettings | None:
        """How a model writes an answer; None where it chooses among given ones.

        Raises:
            UserError: the task asks for anything but greedy decoding.
        """
        if self.task.OUTPUT_TYPE != "generate_until":
            return None
        return GenerationSettings.parse(self.task.config.generation_kwargs, f"The task {self.task.config.task}")

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the definition and all documents, wherever they are stored: equal hashes mean equal questions.

        The definition includes its functions, and in a folder of the user all code that these may call.
        """
        definition = {key: value for key, value in self.task.dump_config().items() if key not in _PLACES}
        documents = [dict(document) for document in self.task.eval_docs]
        examples = [dict(document) for document in self.task.fewshot_docs()] if self.task.config.num_fewshot else []
        version = str((self.task.config.metadata or {}).get("version"))
        return sha256_json(_plain([definition, version, documents, examples, *self._code]))

    @property
    def _code(self) -> list[dict[str, str]]:
        """The Python files of the task's folder by name; empty if there are none, and for lm-eval's own tasks."""
        folder = self.request.folder
        files = sorted(folder.rglob("*.py")) if folder else []
        return [{str(file.relative_to(folder)): sha256_file(file) for file in files}] if folder and files else []


def _plain(value: Any) -> Any:
    """Return a value that JSON can represent, the same in every process: of a function its source."""
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def load_tasks(requests: Sequence[TaskRequest], data: Path, *, run_generated_code: bool = False) -> list[LoadedTask]:
    """Load tasks and their documents, without network access.

    Documents come from ``data/<owner>/<name>`` (a data set as ``hf download`` stores it), from the cache of
    ``datasets``, or, for a task defined in a folder, from files that its YAML names relative to itself.

    Args:
        requests: The tasks to load.
        data: Folder of downloaded data sets.
        run_generated_code: Also load tasks that run the code that a model has written.

    Raises:
        UserError: a task is unknown, its data or packages are not available locally, it lacks the requested metric,
            runs generated code or generates text other than greedily, or different tasks have the same name.
    """
    loaded: list[LoadedTask] = []
    with _settings_of_lm_eval(run_generated_code=run_generated_code):
        for request in requests:
            for task in _load(request, _known_tasks(request.folder), data, run_generated_code):
                task.set_config(
                    key="num_fewshot", value=request.shots if request.shots is not None else _default_shots(task)
                )
                loaded.append(LoadedTask(request, task))
    for one in loaded:
        if one.generation is not None:
            _refuse_missing_script(one)
        _refuse_missing_metric(one)
    _refuse_name_collisions(loaded)
    return loaded


@contextmanager
def _settings_of_lm_eval(*, run_generated_code: bool) -> Iterator[None]:
    """Silence warnings about every option that a definition leaves out, and allow generated code if it is wanted."""
    logger = logging.getLogger("lm_eval")
    level, allowed = logger.level, os.environ.get(_CODE_EVAL)
    logger.setLevel(logging.ERROR)
    if run_generated_code:
        os.environ[_CODE_EVAL] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if allowed is not None:
            os.environ[_CODE_EVAL] = allowed
        elif run_generated_code:
            del os.environ[_CODE_EVAL]


def _known_tasks(folder: Path | None) -> TaskManager:
    """Return lm-eval's index of a folder's tasks, or its built-in one (14,000 files, so read once per process)."""
    return _own_tasks() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)


@cache
def _own_tasks() -> TaskManager:
    return TaskManager()


def _default_shots(task: Task) -> int:
    return task.config.num_fewshot or 0


def _refuse_missing_metric(task: LoadedTask) -> None:
    known = task.task.higher_is_better()
    if task.request.metric is not None and task.request.metric not in known:
        raise UserError(f"The task {task.name} has no metric {task.request.metric} (it has {', '.join(known)}).")


def _refuse_missing_script(task: LoadedTask) -> None:
    """Refuse generated text whose metric is a script of the package evaluate that is not on this machine."""
    if task.task.config.process_results is not None or type(task.task) is not ConfigurableTask:
        return  # computes its metrics itself
    for name, function in task.task._metric_fn_list.items():
        if function is None:
            raise UserError(
                f"The task {task.name} has the metric {name} of the package evaluate, which is not on this machine; "
                f"""run python -c "import evaluate; evaluate.load('{name}')" once with network access."""
            )


def _refuse_name_collisions(tasks: Sequence[LoadedTask]) -> None:
    named: dict[str, LoadedTask] = {}
    for task in tasks:
        first = named.setdefault(task.name, task)
        if first is not task and first.content_hash != task.content_hash:
            sources = " and ".join(str(other.request.folder or "lm-eval") for other in (first, task))
            raise UserError(
                f"{sources} have different tasks named {task.name}; rename one, or evaluate one at a time."
            )


def _load(request: TaskRequest, manager: TaskManager, data: Path, run_generated_code: bool) -> list[Task]:
    """Return a task, or all tasks of a group or tag, each once."""
    entry = manager.task_index.get(request.task)
    if entry is None:
        raise UserError(
            f"lm-eval has no task {request.task}; choose one that lm-eval ls tasks lists, or define it in a folder of "
            "YAML files."
        )
    factory = _LocalTasks(data, run_generated_code)
    with offline() as hosts:
        try:
            built = factory.build(entry, registry=manager.task_index)
        except UserError:
            raise
        except Exception as error:  # a group may name a task that does not exist, or define one itself
            raise _refusal(request.task, None, data, hosts, error) from error
    tasks = built.get_all_tasks() if isinstance(built, Group) else built if isinstance(built, list) else [built]
    for task in tasks:
        _refuse_generated_code(task.config.task, task.config.unsafe_code, run_generated_code)
    return list({task.config.task: task for task in tasks}.values())


class _LocalTasks(TaskFactory):
    """Builds tasks from local data, also those that a group or a tag names."""

    def __init__(self, data: Path, run_generated_code: bool) -> None:
        super().__init__()
        self._data = data
        self._run_generated_code = run_generated_code

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        definition, path = _definition(entry)
        # Before any code of the task is imported.
        _refuse_generated_code(entry.name, definition.get("unsafe_code"), self._run_generated_code)
        repository = (overrides or {}).get("dataset_path", definition.get("dataset_path"))
        local = path.parent if repository in _LOCAL_FORMATS else self._data / str(repository)
        places: dict[str, Any] = {}
        if repository in _LOCAL_FORMATS:
            places = {"dataset_kwargs": _absolute_files(definition.get("dataset_kwargs") or {}, path.parent)}
        elif repository and local.is_dir():
            places = {"dataset_path": str(local.resolve())}
        with offline() as hosts:
            try:
                return super()._build_task(entry, {**(overrides or {}), **places})
            except Exception as error:  # each kind of data set raises other errors if its files are missing
                raise _refusal(entry.name, repository, local, hosts, error) from error


def _refuse_generated_code(task: str, unsafe: Any, run_generated_code: bool) -> None:
    if unsafe and not run_generated_code:
        raise UserError(
            f"The task {task} runs the code that the model writes, with all your rights on this machine; "
            "allow that with --run-generated-code, in a container without network access, or leave the task out."
        )


def _refusal(task: str, repository: Any, local: Path, hosts: Sequence[str], error: Exception) -> UserError:
    """Return what to say of a task that could not be loaded."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ModuleNotFoundError) and (package := error.name):
        return UserError(f"The task {task} needs the package {package}; run pip install {_with_extra(package)}.")
    if hosts:
        return UserError(
            f"The task {task} needs files from {hosts[0]} that are not on this machine ({reason}); get them first: "
            "NLTK's by python -m nltk.downloader punkt_tab, a metric's by python -c \"import evaluate; "
            "evaluate.load('code_eval')\"."
        )
    if repository is None or repository in _LOCAL_FORMATS or local.is_dir():
        return UserError(
            f"The task {task} cannot be loaded from {local} ({reason}); correct its definition or its data."
        )
    return UserError(
        f"The data of the task {task} are not available locally ({reason}); {download(str(repository), local)}, or "
        "give the folder that has them as task data."
    )


def _with_extra(package: str) -> str:
    """Return what to install for a package: the extra of lm-eval that has it, or the package itself."""
    for requirement in metadata.requires("lm_eval") or []:
        if found := re.match(rf"{re.escape(package)}\b.*extra == .(\w+)", requirement):
            return f"'lm_eval[{found[1]}]'"
    return package


def _definition(entry: Entry) -> tuple[dict[str, Any], Path]:
    """Return a task's definition, with the files that it includes merged in, and its YAML file."""
    if entry.yaml_path is None:
        return {}, Path()
    return _with_included(Path(entry.yaml_path)), Path(entry.yaml_path)


def _with_included(path: Path) -> dict[str, Any]:
    definition = read_yaml(path, PlainLoader) or {}
    names = definition.get("include") or []
    included: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        included.update(_with_included(path.parent / name))
    return {**included, **definition}


def _absolute_files(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return ``dataset_kwargs`` with data files resolved against the task's folder, not the working directory."""

    def absolute(files: Any) -> Any:
        if isinstance(files, dict):
            return {split: absolute(names) for split, names in files.items()}
        if isinstance(files, list):
            return [absolute(name) for name in files]
        return str((folder / files).resolve()) if (folder / files).exists() else files

    return {**settings, **({"data_files": absolute(settings["data_files"])} if "data_files" in settings else {})}


def measure_task(loaded: LoadedTask, model: CheckpointLM, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Answer a task's requests and return its metrics by name.

    Each has ``value``, ``stderr`` (None if lm-eval has none), ``higher_is_better``, ``documents``, and
    ``by_document``, the metric of every single document, to compare two models on the same questions. If the model
    answers with NaN, all of its metrics are NaN: lm-eval would take the first choice for the most likely one.

    Args:
        loaded: The task.
        model: The language model.
        limit: Maximum number of documents.
    """
    name = loaded.task.config.task
    # Build the requests again, those of an earlier model contain its answers, and with the same few-shot examples.
    loaded.task._instances = None
    loaded.task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    unsafe = bool(loaded.task.config.unsafe_code)  # load_tasks loads such tasks only if the user wants it
    # lm-eval draws progress bars on standard error for steps that take no time; errors are still raised.
    with redirect_stderr(StringIO()), _settings_of_lm_eval(run_generated_code=unsafe):
        results = evaluate(
            lm=model,
            task_dict={"tasks": {name: loaded.task}},
            limit=limit,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=unsafe,
        )
    assert results is not None
    scores, better = results["results"][name], loaded.task.higher_is_better()
    measured = {}
    for key, value in scores.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or (loaded.request.metric or metric) != metric:
            continue
        error = scores.get(f"{metric}_stderr,{filter_name}")
        label = metric if filter_name == "none" else f"{metric},{filter_name}"
        samples = [sample for sample in results["samples"][name] if sample["filter"] == filter_name]
        broken = any(_has_nan(sample["resps"]) for sample in samples)
        measured[label] = {
            "value": math.nan if broken else float(value),
            "stderr": float(error) if isinstance(error, (int, float)) and not broken else None,
            "higher_is_better": better.get(metric),
            "documents": len(samples),
            "by_document": [] if broken else [_plain(sample.get(metric)) for sample in samples],
        }
    return measured


def _has_nan(answers: Any) -> bool:
    """Return whether a number in nested answers is NaN."""
    if isinstance(answers, (list, tuple)):
        return any(map(_has_nan, answers))
    return isinstance(answers, float) and math.isnan(answers)
