"""The entry point of pruning for commands, recipes and the Python API: run a method on a request, with its cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.pruning.options import VOCAB
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.pruning.request import PruneRequest
from nemo_pvs.pruning.result import Pruned
from nemo_pvs.pruning.spent import spent
from nemo_pvs.pruning.vocabulary.choice import check_vocabulary


class Finished(NamedTuple):
    """A pruned model, not written yet, and what pruning it cost."""

    pruned: Pruned
    spent: dict[str, Any]
    """``search`` and ``calibration``, if there was one (``pruning.spent``)."""


def prune(method: str, request: PruneRequest[Any]) -> Finished:
    """Prune a model; the returned source computes its tensors when they are read.

    Args:
        method: A name in ``pruning.registry``.
        request: The model, with options of that method.

    Raises:
        UserError: there is no such method, or the request does not suit the model.
    """
    if getattr(request.options, VOCAB, None) is not None:
        check_vocabulary(request)
    read: list[TokenSet] = []

    def read_tokens() -> TokenSet:
        read.append(request.tokens())
        return read[-1]

    pruned = method_named(method).prune(replace(request, tokens=read_tokens))
    return Finished(pruned, spent(pruned, request.options, shape_of(request.source), read[0] if read else None))
