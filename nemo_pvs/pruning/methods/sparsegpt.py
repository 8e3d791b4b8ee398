"""SparseGPT: single weights by the error that they leave, the others updated (Frantar and Alistarh, 2301.00774)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import expected_masked, layer_by_layer, sparsity_of
from nemo_pvs.pruning.options import Sparse, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.request import PruneRequest
    from nemo_pvs.pruning.result import Pruned


class SparseGPTOptions(Sparse):
    """The options of SparseGPT."""

    sequential: bool = option("measure each layer after the layers before it have been pruned", True)
    compat: bool = option("reproduce the published code's quirks, and so its numbers", False)


def _prune(request: PruneRequest[SparseGPTOptions]) -> Pruned:
    from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT

    return layer_by_layer(request, SparseGPT(sparsity_of(request), **request.options.given("compat")))


METHOD = PruningMethod(
    name="sparsegpt",
    removes="single weights by the error they leave, the rest updated",
    paper="2301.00774",
    options=SparseGPTOptions,
    prune=_prune,
    expected=expected_masked,
)
