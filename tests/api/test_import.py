"""``import nemo_pvs`` costs nothing, and every name of the API is there when it is used."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_pvs as pvs

PROMISED = {
    *("convert", "calibrate", "prune", "search", "train", "evaluate", "run", "report", "open_checkpoint"),
    *("load_recipe", "Shape", "Layout", "Scores", "Plan", "Ledger", "UserError"),
}


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, nemo_pvs as pvs\n"
        "assert set(pvs.__all__) <= set(dir(pvs))\n"
        "heavy = {'torch', 'numpy', 'transformers', 'megatron', 'nemo', 'pydantic', 'rich', 'typer'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
        "pvs.UserError\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


@pytest.mark.slow
def test_importing_torch_warns_of_nothing() -> None:
    script = "import nemo_pvs, torch"
    done = subprocess.run([sys.executable, "-W", "default", "-c", script], capture_output=True, text=True, check=True)
    assert "pynvml" not in done.stderr


def test_every_name_is_there() -> None:
    assert set(pvs.__all__) >= PROMISED
    for name in pvs.__all__:
        assert getattr(pvs, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'pruned'"):
        _ = pvs.pruned  # type: ignore[attr-defined]


def test_no_name_is_that_of_a_package() -> None:
    """``import nemo_pvs.recipe`` would put the package in the name's place."""
    assert not {module.name for module in pkgutil.iter_modules(pvs.__path__)} & set(pvs.__all__)


def test_type_checkers_see_the_same_names() -> None:
    assert pvs.__file__
    tree = ast.parse(Path(pvs.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "importlib"]
    declared = {
        alias.name: node.module
        for node in imports
        for alias in node.names
        if node.module and node.module.startswith("nemo_pvs.")
    }
    assert declared.keys() == set(pvs.__all__)
    for name, module in declared.items():
        assert getattr(importlib.import_module(module), name) is getattr(pvs, name)
    assert Path(pvs.__file__).with_name("py.typed").is_file()
