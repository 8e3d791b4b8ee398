"""``nemo pvs ...``: the same verbs under NeMo's own command (entry point group ``nemo_run.cli``)."""

from __future__ import annotations

import typing

import nemo_run

from nemo_pvs.verbs import VERBS

for verb in VERBS:
    # NeMo-Run parses arguments by plain types; the help that typer reads from the annotations is in the docstring too.
    verb.__annotations__ = typing.get_type_hints(verb)
    help_line = (verb.__doc__ or "").split("\n\n")[0]
    nemo_run.cli.entrypoint(verb, namespace="pvs", name=verb.__name__, help=help_line)
