"""Minitron-depth: whole layers, by the loss or a task's score without them (Muralidharan et al., 2407.14679)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import expected_sizes, to_shape
from nemo_pvs.pruning.options import NotNegative, Positive, SizesOrRatio, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan
    from nemo_pvs.pruning.request import PruneRequest

NAME = "minitron-depth"

_GREEDY = {"greedy": 0, "sleb": 1}
"""Searches that remove layers one by one, with the default number of layers protected at each end: SLEB's code never
tries to remove the first or the last layer (``early_barrier``, ``latter_barrier``)."""


class MinitronDepthOptions(SizesOrRatio):
    """The options of Minitron-depth."""

    search: Literal["contiguous", "greedy", "sleb", "individual"] = option(
        "how layers are searched: contiguous, greedy, sleb or individual", "contiguous"
    )
    task: str | None = option("choose layers by lm-eval tasks instead of the loss, e.g. winogrande")
    task_limit: Positive | None = option("maximum documents per task")
    protect_first: NotNegative | None = option("layers at the input that are left as they are")
    protect_last: NotNegative | None = option("layers at the output that are left as they are")
    compat: bool = option("reproduce the published code's quirks, and so its numbers", False)

    @property
    def ends(self) -> tuple[int, int]:
        """How many layers are protected at the input and at the output."""
        default = _GREEDY.get(self.search, 0)
        first, last = self.protect_first, self.protect_last
        return default if first is None else first, default if last is None else last

    @property
    def greedy_ends(self) -> tuple[int, int] | None:
        """How many layers a greedy search protects at the input and at the output; None for any other search."""
        return self.ends if self.search in _GREEDY else None


def _plan(request: PruneRequest[MinitronDepthOptions], target: Shape) -> Plan:
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.pruning.structured.depth import (
        layers_to_remove,
        plan_depth,
        plan_individual,
        scan_windows,
        unprotected,
    )
    from nemo_pvs.pruning.structured.depth_task import plan_task, scan_task
    from nemo_pvs.pruning.structured.greedy import plan_greedy, scan_greedy

    options = request.options
    parent, (first, last) = shape_of(request.source), options.ends
    remove = layers_to_remove(parent, target)
    unprotected(parent.layers, remove, first, last)  # refuses too many before anything is measured
    if options.task is not None and request.task_score is not None:
        if options.search != "contiguous":
            raise UserError("--task compares contiguous runs of layers; leave --search out.")
        score = request.task_score()
        with request.progress("scan layers (task)", "models") as show:
            by_task = scan_task(request.source, remove, score, progress=show)
        plan = plan_task(by_task, compat=options.compat, protect_first=first, protect_last=last)
        best = by_task.scores[_first_removed(plan)]
        request.say(f"the best shorter model scores {best:.4f}, the dense one {by_task.dense_score:.4f}")
        return plan
    if options.task_limit is not None:
        raise UserError("--task-limit needs --task; give both, or neither.")
    with request.progress(f"scan layers ({options.search})", "layer passes") as show:
        if options.search in _GREEDY:
            greedy = scan_greedy(
                request.source,
                request.tokens(),
                remove,
                protect_first=first,
                protect_last=last,
                compute=request.compute,
                progress=show,
            )
            return plan_greedy(greedy, options.search)
        width = 1 if options.search == "individual" else remove
        scan = scan_windows(request.source, request.tokens(), width, compute=request.compute, progress=show)
    if options.search == "individual":
        return plan_individual(scan, remove, protect_first=first, protect_last=last)
    plan = plan_depth(scan, compat=options.compat, protect_first=first, protect_last=last)
    start = _first_removed(plan)
    request.say(
        f"without layers {start} to {start + remove - 1} the loss is {scan.losses[start]:.3f} "
        f"instead of {scan.dense_loss:.3f} nats per token"
    )
    return plan


def _first_removed(plan: Plan) -> int:
    return min({*range(plan.parent.layers)} - {*plan.keep_layers})


METHOD = PruningMethod(
    name=NAME,
    removes="whole layers, by the loss or a task's score without them",
    paper="2407.14679",
    options=MinitronDepthOptions,
    prune=to_shape(NAME, _plan),
    expected=expected_sizes(NAME),
    scans=True,
    rounds=True,
)
