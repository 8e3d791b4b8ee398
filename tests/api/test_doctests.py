"""The examples in the docstrings of the Python API run, and say what they give."""

from __future__ import annotations

import asyncio
import doctest
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nemo_pvs as pvs
from nemo_pvs.system.progress import console

FUNCTIONS = [name for name in pvs.__all__ if inspect.isfunction(getattr(pvs, name))]
TRAINS = {"train", "teach", "run"}
TALKS = {"prune"}
"""They say what they do while they work; the others print nothing in a log but progress, after 20 seconds."""


def examples_of(name: str, namespace: dict[str, Any]) -> doctest.DocTest:
    function = getattr(pvs, name)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(function) or "", namespace, name, None, None)
    assert test.examples, f"pvs.{name} has no example"
    return test


def run_examples(name: str, namespace: dict[str, Any]) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner()
    runner.run(examples_of(name, namespace), out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in TRAINS])
def test_the_example_in_a_docstring_runs(
    name: str, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", name in TALKS)
    run_examples(name, namespace)


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("name", ["run", "teach"])
def test_the_example_runs_in_an_event_loop(
    name: str, namespace: dict[str, Any], forked_launcher: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", True)

    async def cell() -> None:
        run_examples(name, namespace)

    asyncio.run(cell())


@pytest.mark.slow
@pytest.mark.parallel
def test_the_example_of_train_runs_from_a_notebook(namespace: dict[str, Any], tmp_path: Path) -> None:
    """In a coroutine, as in a notebook, from a script without a main guard; its ranks are processes of their own."""
    lines = [f"{name} = pathlib.Path({str(path)!r})" for name, path in namespace.items()]
    wanted = []
    for example in examples_of("train", namespace).examples:
        shown = bool(example.want)
        lines += [f"print(repr(({example.source.strip()})))"] if shown else example.source.splitlines()
        wanted += [example.want.strip()] if shown else []
    body = "\n".join(f"    {line}" for line in lines)
    script = f"import asyncio, pathlib\nasync def cell():\n{body}\nasyncio.run(cell())\n"
    done = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-len(wanted) :] == wanted
