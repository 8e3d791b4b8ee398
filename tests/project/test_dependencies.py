"""What the package imports is what it declares."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _imported() -> Iterator[str]:
    """Yield the first name of every absolute import of the package, also of those inside functions."""
    for file in (ROOT / "nemo_pvs").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.split(".")[0]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_every_import_is_declared() -> None:
    block = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert block
    declared = {_plain(name) for name in re.findall(r'^    "([\w.-]+)', block[1], re.MULTILINE)}
    assert {"torch", "nemo-toolkit", "pyyaml"} <= declared
    imported = {*_imported()} - {*sys.stdlib_module_names, "nemo_pvs"}
    assert {"torch", "nemo", "yaml"} <= imported
    owners = packages_distributions()
    missing = {name: owners.get(name) for name in imported if declared.isdisjoint(map(_plain, owners.get(name, [])))}
    assert not missing


def test_every_package_is_in_the_wheel():
    """Setuptools takes them from a list, because recipes, conversions and launch lie outside of nemo_pvs/."""
    block = re.search(r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert block
    listed = re.findall(r'"([\w.]+)"', block[1])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "nemo_pvs").rglob("*.py")}
    data = {"nemo_pvs.recipes", "nemo_pvs.conversions", "nemo_pvs.launch"}
    assert set(listed) == data | {".".join(folder.parts) for folder in folders}
