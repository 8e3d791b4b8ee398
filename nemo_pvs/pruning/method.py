"""What a pruning method is: its name, what it may be asked, and how it prunes."""

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
    """Whether numbers alone decide it; else scores decide layer by layer, and this is about their average."""


@dataclass(frozen=True)
class Method:
    """A way to prune. Another package adds one by an entry point in the group ``nemo_pvs.methods``."""

    name: str
    """As ``pvs prune --method`` and a recipe's ``targets.<name>.method`` have it."""
    removes: str
    """What is removed and by what it is chosen, in a few words."""
    options: type[Options]
    prune: Callable[[PruneRequest[Any]], Pruned]
    expected: Callable[[Any, Shape], Expected] | None = None
    """Takes the options and the parent's shape, and returns the shape to expect; absent where only training shows."""
    paper: str = ""
    """Its arXiv number."""
    scored: bool = False
    """It reads the scores of one calibration (``pvs calibrate``), which targets and ratios share."""
    gradients: bool = False
    """Its scores are measured with gradients."""
    scans: bool = False
    """It runs the model once for each candidate."""
    reads_text: bool = True
    """What it decides depends on the calibration text."""
    rounds: bool = False
    """A recipe may reach its target in rounds of pruning and training (``stages``)."""
    trains: bool = False
    """It decides while the model is trained, which a stage of ``pvs run`` does."""

    @property
    def sparse(self) -> bool:
        """It sets single weights to zero and leaves the shape as it is."""
        return "sparsity" in self.options.amounts
