"""Which Python ``make`` takes, with other sets of programs on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_pvs.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def _program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def _python(folder: Path, name: str, version: str, *, can_make_environments: bool = True) -> None:
    """Write a program that answers as a Python of a version: to the question whether it suits, and to ``-m venv``."""
    major, minor = version.split(".")
    answer = f'exec {sys.executable} -c "import sys; sys.version_info = ({major}, {minor}); $2"'
    make = f'mkdir -p "$3" && echo {name} > "$3/pyvenv.cfg"' if can_make_environments else "exit 1"
    _program(folder, name, f'if [ "$1" = -c ]; then {answer}; fi\n{make}')


def _made_by(tmp_path: Path, *arguments: str) -> tuple[str, str]:
    """Return which program made an environment, and what ``make`` says."""
    for tool in ("sh", "mkdir", "rm"):
        if not (tmp_path / "bin" / tool).exists():
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        [str(shutil.which("make")), "-f", str(ROOT / "Makefile"), "VENV=new", "new/pyvenv.cfg", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    made = tmp_path / "new" / "pyvenv.cfg"
    assert made.exists() == (done.returncode == 0), done.stderr
    return (made.read_text().strip() if made.exists() else ""), done.stderr


@pytest.mark.slow
@needs_make
@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": "3.10"}, "python3"),
        ({"python3": "3.12", "python3.11": "3.11"}, "python3"),
        ({"python3": "3.13", "python3.12": "3.12", "python3.10": "3.10"}, "python3.12"),
        ({"python3": "3.14", "python3.11": "3.11"}, "python3.11"),
        ({"python3": "3.9", "python3.10": "3.10"}, "python3.10"),
        ({"python3.11": "3.11"}, "python3.11"),
        ({"python3": "3.13", "python3.12": "3.13", "uv": ""}, "uv"),
        ({"python3": "3.11", "uv": ""}, "python3"),
        ({"uv": ""}, "uv"),
    ],
)
def test_the_python_that_make_takes(tmp_path: Path, pythons: dict[str, str], chosen: str) -> None:
    for name, version in pythons.items():
        if name == "uv":
            _program(tmp_path / "bin", "uv", 'mkdir -p new && echo "uv" > new/pyvenv.cfg')
        else:
            _python(tmp_path / "bin", name, version)
    assert _made_by(tmp_path)[0] == chosen


@needs_make
def test_a_python_that_cannot_make_environments_is_passed_over(tmp_path: Path) -> None:
    """As Debian's without the package python3-venv."""
    _python(tmp_path / "bin", "python3", "3.11", can_make_environments=False)
    _python(tmp_path / "bin", "python3.12", "3.12")
    assert _made_by(tmp_path)[0] == "python3.12"


@needs_make
def test_without_a_suitable_python_make_says_what_is_needed(tmp_path: Path) -> None:
    _python(tmp_path / "bin", "python3", "3.13")
    made, message = _made_by(tmp_path)
    assert not made
    assert "Python 3.10 to 3.12 is needed" in message
    assert "make PYTHON=/path/to/python3.11" in message
    _python(tmp_path / "bin", "other", "3.12")
    assert _made_by(tmp_path, "PYTHON=other")[0] == "other"


@needs_make
def test_the_demo_runs_on_the_cpu_also_on_a_machine_with_one_gpu(tmp_path):
    """Its arms have two ranks each, and would be refused."""
    assert any(arm.layout.processes > 1 for arm in load_recipe("smollm2_135m/demo").runs)
    _program(tmp_path / "bin", "pvs", f'echo "$CUDA_VISIBLE_DEVICES." > {tmp_path}/seen')
    (tmp_path / "stamp").touch()
    given = [f"BIN={tmp_path / 'bin'}", f"STAMP={tmp_path / 'stamp'}"]
    command = [str(shutil.which("make")), "-f", str(ROOT / "Makefile"), "--assume-old", f"{tmp_path}/stamp", *given]
    subprocess.run([*command, "demo"], cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}, check=True)
    assert (tmp_path / "seen").read_text() == ".\n"
