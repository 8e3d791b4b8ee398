"""``nemo pvs ...``: the same verbs under NeMo's own command (entry point group ``nemo_run.cli``)."""

from __future__ import annotations

import nemo_run

from nemo_pvs.verbs import VERBS

for verb in VERBS:
    help_line = (verb.__doc__ or "").split("\n\n")[0]
    nemo_run.cli.entrypoint(verb, namespace="pvs", name=verb.__name__, help=help_line)
