"""The description of a pruning method: its name, its options and how it prunes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.options import Options

if TYPE_CHECKING:
    from nemo_pvs.pruning.request import PruneRequest
    from nemo_pvs.pruning.result import Pruned


class Expected(NamedTuple):
    """The shape of a target before it is pruned."""

    shape: Shape
    exact: bool
    """Whether the options alone determine it; otherwise scores decide, and this is the average of the layers."""
    uneven: bool = False
    """Whether scores decide the sizes of each layer, so that layers become uneven."""


@dataclass(frozen=True)
class PruningMethod:
    """A pruning method. Another package adds one by an entry point in the group ``nemo_pvs.methods``."""

    name: str
    """Its name in ``pvs prune --method`` and in a recipe's ``targets.<name>.method``."""
    removes: str
    """What it removes and by which criterion, in a few words."""
    options: type[Options]
    prune: Callable[[PruneRequest[Any]], Pruned]
    expected: Callable[[Any, Shape], Expected] | None = None
    """From the options and the parent's shape to the expected shape; None if it is known only after training."""
    paper: str = ""
    """Its arXiv number."""
    scored: bool = False
    """It reads the scores of a calibration (``pvs calibrate``), which targets and ratios share."""
    gradients: bool = False
    """Its scores need gradients."""
    scans: bool = False
    """It runs the model once for each candidate."""
    reads_text: bool = True
    """Its result depends on the calibration text."""
    rounds: bool = False
    """A recipe may reach its target in rounds of pruning and training (``stages``)."""
    trains: bool = False
    """It prunes during training, in a stage of ``pvs run``."""

    @property
    def sparse(self) -> bool:
        """It sets single weights to zero and keeps the shape."""
        return "sparsity" in self.options.amounts
