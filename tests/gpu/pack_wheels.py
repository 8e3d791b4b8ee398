"""Collect the wheels with which ``run.sh`` runs where there is Python and PyTorch, but no network.

    python -m tests.gpu.pack_wheels FOLDER [--have FREEZE] [--python 3.12]

Run it in an environment that trains on a CPU: what is packed is what a training imports there, in the same versions,
and this package. FREEZE is what ``pip freeze`` prints on the machine with the GPU: what it names is left out.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PARTS = ("nemo_pvs", "recipes", "conversions", "launch", "pyproject.toml", "README.md", "LICENSE")
"""Of the checkout, what this package is built from."""
_LINUX = [f"manylinux_2_{minor}_x86_64" for minor in (39, 34, 31, 28, 27, 24, 17, 12, 5)]
_NOT_IMPORTED = {
    "nemo_toolkit": [f"nemo/collections/{name}/*" for name in ("asr", "audio", "diffusion", "multimodal", "speechlm*",
                     "tts", "vlm")],
    "pulp": ["pulp/solverdir/cbc/*"],
}  # fmt: skip
"""Large parts of wheels, such as NeMo's speech models, that nothing here uses."""


def main() -> None:
    """Pack, and print how much it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--have", type=Path, help="its output of pip freeze")
    parser.add_argument("--python", default="3.12", help="its version of Python")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    listing = subprocess.run([sys.executable, "-m", "tests.gpu.needed"], stdout=subprocess.PIPE, text=True, check=True)
    have = names(given.have.read_text()) if given.have else set()
    for requirement in listing.stdout.split():
        if not names(requirement) & have:
            _fetch(requirement, given.folder, given.python)
    with tempfile.TemporaryDirectory() as copy:  # or what it builds would stay in the checkout
        for name in _PARTS:
            (shutil.copytree if (_ROOT / name).is_dir() else shutil.copy)(_ROOT / name, Path(copy) / name)
        _pip("wheel", "--no-deps", "--wheel-dir", given.folder, copy)
    for wheel in given.folder.glob("*.whl"):
        slim(wheel)
    size = sum(wheel.stat().st_size for wheel in given.folder.glob("*.whl"))
    print(f"{len(list(given.folder.glob('*.whl')))} wheels, {size / 1e6:.0f} MB")


def names(freeze: str) -> set[str]:
    """Return the normalised names of packages in lines such as ``Name==1.0`` or ``name @ file:...``."""
    found = (re.match(r"[A-Za-z0-9][\w.-]*", line) for line in freeze.splitlines())
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def slim(wheel: Path) -> None:
    """Rewrite a wheel without what nothing here imports."""
    patterns = _NOT_IMPORTED.get(wheel.name.split("-")[0], [])
    if not patterns:
        return
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as kept:
        for entry in whole.infolist():
            if not any(fnmatch(entry.filename, pattern) for pattern in patterns):
                kept.writestr(entry, whole.read(entry))
    partial.replace(wheel)


def _fetch(requirement: str, folder: Path, python: str) -> None:
    """Download a wheel for the other machine, or build one: then it must not depend on the platform."""
    platforms = [argument for name in _LINUX for argument in ("--platform", name)]
    version = ("--python-version", python, "--implementation", "cp", "--only-binary=:all:")
    try:
        _pip("download", "--no-deps", *version, *platforms, "--dest", folder, requirement)
    except subprocess.CalledProcessError:
        _pip("wheel", "--no-deps", "--wheel-dir", folder, requirement)


def _pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
