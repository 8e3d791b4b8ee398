"""Wanda: single weights by |W| |x| (Sun et al., 2306.11695)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import expected_masked, layer_by_layer, sparsity_of
from nemo_pvs.pruning.options import Sparse, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.request import PruneRequest
    from nemo_pvs.pruning.result import Pruned


class WandaOptions(Sparse):
    """The options of Wanda."""

    sequential: bool = option("measure each layer after the layers before it have been pruned", True)


def _prune(request: PruneRequest[WandaOptions]) -> Pruned:
    from nemo_pvs.pruning.sparse.wanda import Wanda

    return layer_by_layer(request, Wanda(sparsity_of(request)))


METHOD = PruningMethod(
    name="wanda",
    removes="single weights by |W| |x|",
    paper="2306.11695",
    options=WandaOptions,
    prune=_prune,
    expected=expected_masked,
)
