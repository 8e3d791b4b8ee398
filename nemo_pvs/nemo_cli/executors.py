"""The launch profiles as executors of NeMo's own command: ``nemo llm ... run.executor=pvs_slurm_h100``.

NeMo-Run looks an executor up by the name of a factory, and takes changes of it as ``run.executor.nodes=16``.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path

import nemo_run as run

from nemo_pvs.cli.factory_names import executor_name
from nemo_pvs.cluster.profile import load_profile, packaged_profiles

_FOLDER = "runs"
"""Where factories look for prepared runs; batch scripts and logs go into ``slurm`` in it."""


def register() -> None:
    """Register every packaged profile by its name, and ``pvs_profile(FILE)`` for a profile of one's own."""
    for name in packaged_profiles():
        run.cli.factory(_executor(name), name=executor_name(name))
    run.cli.factory(profile_executor, name=executor_name("profile"))


def profile_executor(profile: str) -> run.Config[run.Executor]:
    """Return the executor of a launch profile, one node of it.

    Args:
        profile: A packaged name, or the path of a YAML file.

    Raises:
        UserError: there is no such profile, or it cannot run under NeMo's command as it is.
    """
    return load_profile(profile).function_executor(Path(_FOLDER).resolve()).to_config()


def _executor(profile: str) -> Callable[[], run.Config[run.Executor]]:
    def factory() -> run.Config[run.Executor]:
        return profile_executor(profile)

    factory.__annotations__ = typing.get_type_hints(factory)
    return factory


profile_executor.__annotations__ = typing.get_type_hints(profile_executor)  # NeMo-Run reads types, not their names
