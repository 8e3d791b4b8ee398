"""Vocabulary: tokens that are rare in a text, with their rows of the embedding and of the output head."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import Expected, PruningMethod
from nemo_pvs.pruning.methods.steps import planned
from nemo_pvs.pruning.options import VOCAB, VocabularySize

if TYPE_CHECKING:
    from nemo_pvs.pruning.request import PruneRequest
    from nemo_pvs.pruning.result import Pruned

NAME = "vocabulary"


class VocabularyOptions(VocabularySize):
    """The options of vocabulary pruning."""

    amounts: ClassVar[tuple[str, ...]] = (VOCAB,)


def _prune(request: PruneRequest[VocabularyOptions]) -> Pruned:
    from nemo_pvs.checkpoints.fingerprint import fingerprint
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.pruning.plan import Plan, whole_layers

    if request.options.vocab is None:
        raise UserError("Nothing says how many tokens to keep; give --target vocab=32000.")
    parent = shape_of(request.source)
    everything = Plan(
        method=NAME,
        parent=parent,
        target=parent,
        **whole_layers(parent, range(parent.layers)),
        provenance={"model_fingerprint": fingerprint(request.source)},
    )
    return planned(request, everything)


def _expected(options: VocabularyOptions, parent: Shape) -> Expected:
    return Expected(parent, exact=True)


METHOD = PruningMethod(
    name=NAME,
    removes="tokens that are rare in a text",
    options=VocabularyOptions,
    prune=_prune,
    expected=_expected,
)
