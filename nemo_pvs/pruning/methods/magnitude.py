"""Magnitude pruning: single weights by |W| (Han et al., 1506.02626)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import expected_masked, sparsity_of
from nemo_pvs.pruning.options import Sparse, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.request import PruneRequest
    from nemo_pvs.pruning.result import Pruned


class MagnitudeOptions(Sparse):
    """The options of magnitude pruning."""

    compat: bool = option("reproduce the published code's quirks, and so its numbers", False)


def _prune(request: PruneRequest[MagnitudeOptions]) -> Pruned:
    from nemo_pvs.pruning.result import Pruned
    from nemo_pvs.pruning.sparse.magnitude import MagnitudeSource

    sparsity = sparsity_of(request)
    source = MagnitudeSource(request.source, sparsity, compat=request.options.compat)
    return Pruned(source, None, {"method": "magnitude", "sparsity": str(sparsity)})


METHOD = PruningMethod(
    name="magnitude",
    removes="single weights by |W|",
    paper="1506.02626",
    options=MagnitudeOptions,
    prune=_prune,
    expected=expected_masked,
    reads_text=False,
)
