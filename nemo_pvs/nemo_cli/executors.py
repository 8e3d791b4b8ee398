"""Launch profiles as executors of NeMo's own command: ``nemo llm ... run.executor=pvs_slurm_h100``.

NeMo-Run looks up an executor by the name of its factory, and accepts overrides such as ``run.executor.nodes=16``.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path

import nemo_run as run

from nemo_pvs.cli.factory_names import executor_name
from nemo_pvs.cluster.profile import load_profile, packaged_profiles

_FOLDER = "runs"
"""Folder in which factories look for prepared runs; batch scripts and logs are written to its subfolder ``slurm``."""


def register() -> None:
    """Register every packaged profile by its name, and ``pvs_profile(FILE)`` for a user's own profile."""
    for name in packaged_profiles():
        run.cli.factory(_executor(name), name=executor_name(name))
    run.cli.factory(profile_executor, name=executor_name("profile"))


def profile_executor(profile: str) -> run.Config[run.Executor]:
    """Return the executor of a launch profile, with one node.

    Args:
        profile: A packaged name, or the path of a YAML file.

    Raises:
        UserError: there is no such profile, or NeMo's command cannot use it.
    """
    return load_profile(profile).function_executor(Path(_FOLDER).resolve()).to_config()


def _executor(profile: str) -> Callable[[], run.Config[run.Executor]]:
    def factory() -> run.Config[run.Executor]:
        return profile_executor(profile)

    factory.__annotations__ = typing.get_type_hints(factory)
    return factory


profile_executor.__annotations__ = typing.get_type_hints(profile_executor)  # NeMo-Run needs types, not strings
