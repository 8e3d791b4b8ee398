"""What the doctor says about Python and the installed packages; nothing that is slow to import is imported."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from nemo_pvs.doctor.finding import Finding, Level
from nemo_pvs.system import transformer_engine

TRANSFORMER_ENGINE = SpecifierSet(">=2.9,<2.10")
"""What Megatron-Core 0.15 declares."""
IMAGE = "nvcr.io/nvidia/nemo:25.11"
"""NVIDIA's container for which launch/ has a Dockerfile."""

_PYTHONS = SpecifierSet(">=3.10,<3.13")
_NAMED = (
    "torch",
    "nemo-toolkit",
    "megatron-core",
    "nemo-run",
    "nvidia-modelopt",
    "nvidia-resiliency-ext",
    "transformers",
)
"""Packages whose versions are shown even if nothing is wrong with them."""
_DECISIVE = {"nemo-toolkit", "megatron-core"}
"""Training fails with other versions of these; for the others, pyproject.toml says what was seen to work."""

_NOT_FOLLOWED = re.compile(r"torch$|nemo-toolkit|megatron-core|nvidia-|nv-one-logger|transformer-engine|triton")
"""Names of packages whose requirements are not looked at."""

Versions = Callable[[str], str | None]
"""Returns the installed version of a distribution, None if there is none."""


def installed_version(name: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def our_requirements() -> list[str] | None:
    """Return what nemo_pvs declares that it needs; None if it is not installed as a package."""
    try:
        return metadata.requires("nemo-pvs") or []
    except metadata.PackageNotFoundError:
        return None


def requirements_of(name: str) -> list[str]:
    """Return what an installed distribution declares that it needs."""
    return metadata.requires(name) or []


def check_python(version: str = platform.python_version()) -> Finding:
    """Check the version of Python."""
    if version in _PYTHONS:
        return Finding("ok", "Python", f"{version}, {sys.executable}")
    return Finding("FAIL", "Python", f"{version}, but NeMo 2 needs {_PYTHONS}", "python3.11 -m venv .venv")


def of_nvidia(versions: Versions = installed_version) -> bool:
    """Return whether PyTorch is NVIDIA's own build, as in its containers; pip must not replace it."""
    return "nv" in (versions("torch") or "").partition("+")[2]


def check_packages(requirements: Iterable[str] | None, versions: Versions = installed_version) -> list[Finding]:
    """Compare installed versions with what nemo_pvs declares.

    Args:
        requirements: As ``our_requirements`` returns them.
        versions: Returns installed versions.
    """
    if requirements is None:
        return [Finding("FAIL", "nemo_pvs", "it is not installed as a package", "pip install --no-deps --editable .")]
    install, wrong = _install(versions), []
    for text in requirements:
        wanted = Requirement(text)
        if not _applies(wanted, ()):
            continue
        name, found = canonicalize_name(wanted.name), versions(wanted.name)
        needed = f"{name}{wanted.specifier}"
        if found is None:
            wrong.append(Finding("FAIL", name, f"not installed, but {needed} is needed", f"{install} '{needed}'"))
        elif not _within(found, wanted.specifier):
            level: Level = "FAIL" if name in _DECISIVE else "warn"
            in_image = name in _DECISIVE and of_nvidia(versions)
            fix = f"use the image {IMAGE}" if in_image else f"{install} '{needed}'"
            wrong.append(Finding(level, name, f"{found}, but {needed} is needed", fix))
    named = ", ".join(f"{name} {found}" for name in _NAMED if (found := versions(name)))
    return [Finding("ok", "packages", named), *wrong]


def check_dependencies(
    requirements: Iterable[str] | None,
    versions: Versions = installed_version,
    requires: Callable[[str], list[str]] = requirements_of,
) -> list[Finding]:
    """Look for packages that are missing although installed ones need them, as after ``pip install --no-deps``.

    What PyTorch, NeMo and NVIDIA's packages need is not followed: their containers have it, or do without.

    Args:
        requirements: As ``our_requirements`` returns them; what is missing of these is left to ``check_packages``.
        versions: Returns installed versions.
        requires: Returns the requirements of an installed distribution.

    Returns:
        One finding that names all of them, or none.
    """
    direct = [wanted for wanted in map(Requirement, requirements or ()) if _applies(wanted, ())]
    todo, ours = list(direct), {canonicalize_name(wanted.name) for wanted in direct}
    seen: set[tuple[str, frozenset[str]]] = set()
    missing: dict[str, str] = {}
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen or _NOT_FOLLOWED.match(name) or versions(name) is None:
            continue
        seen.add((name, extras))
        for needed in map(Requirement, requires(name)):
            if not _applies(needed, extras):
                continue
            todo.append(needed)
            needed_name = canonicalize_name(needed.name)
            if needed_name not in ours and versions(needed.name) is None:
                missing.setdefault(needed_name, name)
    if not missing:
        return []
    named = ", ".join(f"{name} (for {by})" for name, by in sorted(missing.items()))
    fix = f"{_install(versions)} {' '.join(sorted(missing))}"
    return [Finding("warn", "dependencies", f"not installed: {named}", fix)]


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement holds on this machine, for a package that is wanted with these extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _install(versions: Versions) -> str:
    return "pip install --no-deps" if of_nvidia(versions) else "pip install -c constraints.txt"


def _within(version: str, bounds: SpecifierSet) -> bool:
    """Return whether a version is within bounds; false if it is not a version, as in some development builds."""
    try:
        return bounds.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def check_transformer_engine(
    *, gpu: bool, build: bool, versions: Versions = installed_version, problem: Callable[[], str | None] | None = None
) -> list[Finding]:
    """Import Transformer Engine where it matters: where there is a GPU, or while an image for GPUs is built.

    Args:
        gpu: Whether PyTorch can use a GPU here.
        build: Whether an image is being built, where the driver is missing.
        versions: Returns installed versions.
        problem: Returns why it cannot be imported, as ``transformer_engine.import_problem``.
    """
    subject, found = "Transformer Engine", versions("transformer-engine")
    if not (gpu or build):
        return []
    rebuild = f"docker pull {IMAGE}" if of_nvidia(versions) else transformer_engine.BUILD
    if found is None:
        text = "not installed: no FP8 and no context parallelism, and layers are slower and need more memory"
        return [Finding("FAIL" if build else "warn", subject, text, rebuild)]
    reason = (problem or transformer_engine.import_problem)()
    if reason and build and "libcuda" in reason:
        reason = None  # the driver's library comes with the node
        findings = [Finding("note", subject, f"{found}, whose import needs the driver, so it is not checked here")]
    elif reason:
        return [Finding("FAIL", subject, f"{found} cannot be imported, nor can Megatron with it: {reason}", rebuild)]
    else:
        findings = [Finding("ok", subject, f"{found}, imported")]
    if not _within(found, TRANSFORMER_ENGINE):
        text = f"{found}, but Megatron-Core 0.15 needs {TRANSFORMER_ENGINE}"
        findings.append(Finding("warn", subject, text, rebuild))
    return findings
