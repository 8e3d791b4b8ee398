"""The plugin of NeMo's own command, which loads this module through the entry point group ``nemo_run.cli``.

It adds ``nemo pvs VERB`` for all verbs, ``nemo llm pretrain --factory pvs_...`` for the runs of our recipes,
``nemo llm prune --factory pvs_...`` for our pruning methods, and ``run.executor=pvs_...`` for our launch profiles.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any

import nemo_run

from nemo_pvs.cli.verbs import VERBS
from nemo_pvs.system.files import expand_home
from nemo_pvs.system.gpu_environment import set_gpu_environment
from nemo_pvs.system.megatron_import import import_megatron

set_gpu_environment()  # for a training in this process; executors pass it to others
import_megatron()

from nemo_pvs.nemo_cli import executors, factories  # noqa: E402


def _register(verb: Callable[..., None]) -> None:
    """Register a verb; NeMo-Run needs plain types, and the help of each argument in the docstring."""
    annotated = typing.get_type_hints(verb, include_extras=True)
    helps = {name: hint.__metadata__[0].help for name, hint in annotated.items() if hasattr(hint, "__metadata__")}
    summary = verb.__doc__ or ""
    verb.__doc__ = "\n".join([summary, "", "Args:", *(f"    {name}: {text}" for name, text in helps.items())])
    plain: dict[str, Any] = typing.get_type_hints(verb)
    verb.__annotations__ = plain
    annotated_parameters = inspect.signature(verb).parameters.values()
    parameters = [parameter.replace(annotation=plain[parameter.name]) for parameter in annotated_parameters]
    verb.__signature__ = inspect.Signature(parameters, return_annotation=None)
    nemo_run.cli.entrypoint(verb, namespace="pvs", name=verb.__name__, help=summary)


for verb in VERBS:
    _register(verb)
if sys.argv[1:2] == ["pvs"]:
    sys.argv[2:] = [expand_home(word) for word in sys.argv[2:]]  # not every shell expands out=~/x

factories.register()
executors.register()
