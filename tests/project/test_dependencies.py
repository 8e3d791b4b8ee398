"""What the package imports is what it declares."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nemo_pvs.doctor.packages import IMAGE

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


def _pins(name: str) -> dict[str, str]:
    """Return the pinned versions of a constraints file; markers are left out."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split(" ;")[0].split("==") for line in lines)
    return {_plain(package): version for package, version in pins.items()}


@pytest.mark.slow
def test_pinned_versions_install_on_every_supported_python() -> None:
    """Debian 12 has Python 3.11.2, so a package that needs 3.11.5 must not be pinned."""
    refused = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        for python in ("3.10.0", "3.11.0", "3.12.0"):
            environment = {"python_version": python.rpartition(".")[0], "python_full_version": python}
            if pin.marker and not pin.marker.evaluate(environment):
                continue
            try:
                supported = metadata(pin.name).get("Requires-Python")
            except PackageNotFoundError:
                continue  # of another platform or extra
            if supported and python not in SpecifierSet(supported):
                refused.append(f"{pin}: {supported}")
    assert not refused


def _declared(extra: str = "") -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(rf"^{extra or 'dependencies'} = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block
    return [Requirement(line) for line in re.findall(r'^    "([^"]+)"', block[1], re.MULTILINE)]


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-gpu.txt", "constraints-nemo-25.11.txt"])
def test_pinned_versions_are_within_the_declared_bounds(name):
    pins = _pins(name)
    declared = [*_declared(), *_declared("gpu")]
    outside = [str(one) for one in declared if (pin := pins.get(_plain(one.name))) and pin not in one.specifier]
    assert not outside


def test_on_gpus_only_pytorch_and_what_is_built_for_it_differ():
    cpu, gpu = _pins("constraints.txt"), _pins("constraints-gpu.txt")
    assert {name for name in cpu if gpu.get(name) != cpu[name]} == {"torch", "cuda-bindings", "cuda-pathfinder"}
    more = {name for name in gpu if name not in cpu and not name.startswith("nvidia-")}
    engine = {"transformer-engine", "transformer-engine-torch", "transformer-engine-cu12"}
    assert more == {*engine, "triton", "onnxscript", "onnx-ir"}
    assert {gpu[name] for name in engine} == {"2.9.0"}
    assert all(name.endswith("-cu12") for name in gpu if name.startswith("nvidia-") and name not in cpu)


def test_what_is_added_to_the_container_needs_nothing_of_nvidia_s():
    """So that pip cannot be led to replace its PyTorch, whatever is forgotten on the command line."""
    added, tested = _pins("constraints-nemo-25.11.txt"), _pins("constraints.txt")
    assert {name: tested[name] for name in added} == added
    for name in added:
        needed = [Requirement(text) for text in requires(name) or []]
        always = {_plain(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": ""})}
        assert not [one for one in always if re.match(r"torch$|nvidia|cuda|transformer-engine|megatron", one)], name


def test_the_image_is_made_as_the_page_says_and_ends_with_the_doctor():
    image = (ROOT / "launch" / "Dockerfile").read_text()
    page = (ROOT / "launch" / "README.md").read_text()
    (command,) = re.findall(r"^PIP_CONSTRAINT= (python .*)$", page, re.MULTILINE)
    assert command in image.replace(" --no-cache-dir", "")
    assert image.rstrip().endswith("&& pvs doctor --build")
    assert f"ARG IMAGE={IMAGE}\n" in image
    assert IMAGE in page


def test_every_package_is_in_the_wheel():
    """Setuptools takes them from a list, because recipes, conversions and launch lie outside of nemo_pvs/."""
    block = re.search(r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert block
    listed = re.findall(r'"([\w.]+)"', block[1])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "nemo_pvs").rglob("*.py")}
    data = {"nemo_pvs.recipes", "nemo_pvs.conversions", "nemo_pvs.launch"}
    assert set(listed) == data | {".".join(folder.parts) for folder in folders}


def test_a_checkout_is_whole_where_another_copy_is_installed(tmp_path):
    """Jobs start ``python -m nemo_pvs...`` in the folder of the command, which may be a checkout."""
    program = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import nemo_pvs.conversions, nemo_pvs.launch
from nemo_pvs.recipe.load import load_recipe
print(load_recipe("llama31_8b/p200").name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["llama31_8b_p200"], done.stderr
