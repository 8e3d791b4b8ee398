"""The pruning methods by name: what each takes, and how it makes a pruned model of a dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.request import Options, PruneRequest
from nemo_pvs.pruning.result import Pruned
from nemo_pvs.pruning.sparse.magnitude import MagnitudeSource
from nemo_pvs.pruning.sparse.sequential import prune_layers
from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.sparse.wanda import Wanda
from nemo_pvs.pruning.structured.adapt_pruner import AdaptPrunerSettings, LayerMeasure, plan_adapt_pruner
from nemo_pvs.pruning.structured.depth import SEARCHES, layers_to_remove, plan_depth, plan_individual, scan_windows
from nemo_pvs.pruning.structured.depth_task import plan_task, scan_task
from nemo_pvs.pruning.structured.flap import plan_flap
from nemo_pvs.pruning.structured.greedy import GREEDY, plan_greedy, protected_ends, scan_greedy
from nemo_pvs.pruning.structured.joint import plan_joint
from nemo_pvs.pruning.structured.llm_pruner import plan_llm_pruner
from nemo_pvs.pruning.structured.magnitude_sp import plan_magnitude_sp
from nemo_pvs.pruning.structured.shortgpt import plan_shortgpt
from nemo_pvs.pruning.structured.wanda_sp import plan_wanda_sp
from nemo_pvs.pruning.structured.width import plan_width
from nemo_pvs.pruning.target import choose_target, describe_removal, parameters_left


@dataclass(frozen=True)
class Method:
    """A way to prune."""

    summary: str
    takes: tuple[str, ...]
    """The options that mean something to it."""
    prune: Callable[[PruneRequest], Pruned]
    gradients: bool = False
    """Whether its scores are measured with gradients."""
    trains: bool = False
    """Whether it trains the model while it finds out what to keep, which a stage of ``pvs run`` does."""


def prune_by(method: str, job: PruneRequest) -> Pruned:
    """Prune a model; what is returned streams the result when it is read.

    Raises:
        UserError: there is no such method, an option is not one of its own, or it cannot be done.
    """
    if method not in METHODS:
        raise UserError(f"--method is {method!r}; choose {', '.join(METHODS)}.")
    chosen = METHODS[method]
    given = job.options.given(*(one.name for one in fields(Options)))
    foreign = [f"--{name.replace('_', '-')}" for name in given if name not in chosen.takes]
    if foreign and not chosen.trains:  # which has a sentence of its own
        own = ", ".join(f"--{name.replace('_', '-')}" for name in chosen.takes)
        raise UserError(f"{method} has no {' or '.join(foreign)}; its own options are {own}.")
    return chosen.prune(job)


def _sized(method: str, plan: Callable[[PruneRequest, Shape], Plan]) -> Callable[[PruneRequest], Pruned]:
    """A method that is given the shape to reach."""

    def prune(job: PruneRequest) -> Pruned:
        options = job.options
        target = choose_target(
            shape_of(job.source),
            method,
            target=options.target,
            ratio=options.ratio,
            of=options.of or "body",
            preset=options.preset,
        )
        job.check(target)
        job.say(f"target: {target}; {describe_removal(shape_of(job.source), target)}")
        return _planned(job, plan(job, target))

    return prune


def _scored(plan: Callable[..., Plan], *takes: str) -> Callable[[PruneRequest], Pruned]:
    """A method that is given a ratio and finds the shape itself."""

    def prune(job: PruneRequest) -> Pruned:
        if job.options.ratio is None:
            raise UserError("Nothing says how much to prune; give --ratio 0.2 for a fifth of the decoder layers.")
        made = plan(job.scores(), job.options.ratio, **job.options.given(*takes))
        job.check(made.target)
        job.say(f"target: {made.target}; {describe_removal(shape_of(job.source), made.target)}")
        return _planned(job, made)

    return prune


def _planned(job: PruneRequest, plan: Plan) -> Pruned:
    return Pruned(PrunedSource(job.source, plan), plan, {"method": plan.method})


def _depth(job: PruneRequest, target: Shape) -> Plan:
    search = job.options.search or "contiguous"
    remove = layers_to_remove(shape_of(job.source), target)
    if search not in SEARCHES:
        raise UserError(f"--search is {search!r}; choose {', '.join(SEARCHES)}.")
    if job.options.task is not None and job.task_score is not None:
        if search != "contiguous":
            raise UserError("--task compares contiguous runs of layers; leave --search out.")
        score = job.task_score()
        with job.progress("scan layers (task)", "models") as show:
            by_task = scan_task(job.source, remove, score, progress=show)
        best = max(by_task.scores)
        job.say(f"the best shorter model scores {best:.4f}, the dense one {by_task.dense_score:.4f}")
        return plan_task(by_task, **job.options.given("compat"))
    if job.options.task_limit is not None:
        raise UserError("--task-limit is about --task; give both, or neither.")
    with job.progress(f"scan layers ({search})", "layer passes") as show:
        if search in GREEDY:
            first, last = protected_ends(search, job.options.protect_first, job.options.protect_last)
            scan_steps = scan_greedy(
                job.source,
                job.tokens(),
                remove,
                protect_first=first,
                protect_last=last,
                **job.compute,
                progress=show,
            )
            return plan_greedy(scan_steps, search)
        width = 1 if search == "individual" else remove
        scan = scan_windows(job.source, job.tokens(), width, **job.compute, progress=show)
    if search == "individual":
        return plan_individual(scan, remove, **job.options.given(*_PROTECT))
    plan = plan_depth(scan, **job.options.given("compat"))
    job.say(
        f"without layers {scan.start} to {scan.start + scan.removed - 1} the loss is {min(scan.losses):.3f} "
        f"instead of {scan.dense_loss:.3f} nats per token"
    )
    return plan


def _shortgpt(job: PruneRequest, target: Shape) -> Plan:
    remove = layers_to_remove(shape_of(job.source), target)
    return plan_shortgpt(job.scores(), remove, **job.options.given(*_PROTECT))


def _width(job: PruneRequest, target: Shape) -> Plan:
    return plan_width(job.scores(), target, **job.options.given("aggregation"))


def _joint(job: PruneRequest, target: Shape) -> Plan:
    return plan_joint(job.scores(), target, **job.options.given("aggregation"))


def _by_training(method: str) -> Callable[[PruneRequest], Pruned]:
    """A method that finds out what to keep while it trains the model, which a stage of ``pvs run`` does."""

    def prune(job: PruneRequest) -> Pruned:
        raise UserError(
            f"{method} trains the model while it finds out what to keep; write a recipe with a target of this method, "
            "and use pvs run."
        )

    return prune


def _adapt(job: PruneRequest) -> Pruned:
    shape, options = shape_of(job.source), job.options
    if options.ratio is None:
        raise UserError("Nothing says how much to prune; give --ratio 0.2 for a fifth of all parameters.")
    count = parameters_left(shape, options.ratio, options.of or "total")
    settings = AdaptPrunerSettings(**options.given(*_ADAPT))
    measure = LayerMeasure(job.draw or (lambda _: job.tokens()), settings.metric, job.compute)
    with job.progress("prune by adapt-pruner", "parameters") as show:
        plan = plan_adapt_pruner(job.source, count, measure, settings, show)
    job.check(plan.target)
    job.say(f"target: {plan.target}; {describe_removal(shape, plan.target)}")
    cost = {"tokens": measure.tokens, "flops": measure.flops}
    return _planned(job, replace(plan, provenance={**plan.provenance, "calibration": cost}))


def _magnitude(job: PruneRequest) -> Pruned:
    sparsity = _sparsity(job)
    source = MagnitudeSource(job.source, sparsity, **job.options.given("compat"))
    return Pruned(source, None, {"method": "magnitude", "sparsity": str(sparsity)})


def _layer_by_layer(method: Callable[..., Any], *takes: str) -> Callable[[PruneRequest], Pruned]:
    """A method that prunes every matrix by its inputs, behind the layers pruned before."""

    def prune(job: PruneRequest) -> Pruned:
        made = method(_sparsity(job), **job.options.given(*takes))
        with job.progress(f"prune by {made.settings['method']}", "sequences through a layer") as show:
            source = prune_layers(
                job.source,
                job.tokens(),
                made,
                job.work_folder,
                calibration="dense" if job.options.sequential is False else "sequential",
                overwrite=job.overwrite,
                **job.compute,
                progress=show,
                warn=job.say,
            )
        return Pruned(source, None, source.record["settings"])

    return prune


def _sparsity(job: PruneRequest) -> Sparsity:
    if job.options.sparsity is None:
        raise UserError("Nothing says how sparse; give --sparsity 0.5 or --sparsity 2:4.")
    return Sparsity.parse(job.options.sparsity)


_SIZES = ("target", "ratio", "of", "preset")
_PROTECT = ("protect_first", "protect_last")
_UNITS = ("ratio", "structure", "remove_groups", "ffn_multiple", "kv_groups_multiple")
_TAYLOR = ("metric", *_UNITS[1:], "uniform", *_PROTECT)
_ADAPT = ("iterations", "amplitude", "metric", "ffn_multiple", "kv_groups_multiple", "compat")
_FLAP = ("metric", "structure", "remove_groups", "bias", "uniform", "ffn_multiple", "kv_groups_multiple", "compat")

METHODS: Mapping[str, Method] = {
    "minitron-depth": Method(
        "whole layers, by the loss or a task's score without them",
        (*_SIZES, "search", "task", "task_limit", *_PROTECT, "compat"),
        _sized("minitron-depth", _depth),
    ),
    "shortgpt": Method("whole layers, by how little they change", (*_SIZES, *_PROTECT), _sized("shortgpt", _shortgpt)),
    "minitron-width": Method(
        "hidden and FFN channels and KV groups, by activations",
        (*_SIZES, "aggregation"),
        _sized("minitron-width", _width),
    ),
    "minitron-joint": Method(
        "layers and widths at once, to what pvs search found",
        ("target", "preset", "aggregation"),
        _sized("minitron-joint", _joint),
    ),
    "flap": Method(
        "KV groups and FFN channels by fluctuation, with biases", ("ratio", *_FLAP), _scored(plan_flap, *_FLAP)
    ),
    "wanda-sp": Method("KV groups and FFN channels by |W| |x|", _UNITS, _scored(plan_wanda_sp, *_UNITS[1:])),
    "magnitude-sp": Method("KV groups and FFN channels by |W|", _UNITS, _scored(plan_magnitude_sp, *_UNITS[1:])),
    "llm-pruner": Method(
        "KV groups and FFN channels by |W gradient|",
        ("ratio", *_TAYLOR),
        _scored(plan_llm_pruner, *_TAYLOR),
        gradients=True,
    ),
    "sheared-llama": Method(
        "hidden and FFN channels, KV groups and layers, by masks learned in training",
        ("target", "preset"),
        _by_training("sheared-llama"),
        trains=True,
    ),
    "efficient-llm": Method(
        "hidden and FFN channels and KV groups, one by one while the model trains",
        (),
        _by_training("efficient-llm"),
        trains=True,
    ),
    "adapt-pruner": Method(
        "KV groups and FFN channels by |W gradient|, most from layers that change their input least",
        ("ratio", "of", *_ADAPT),
        _adapt,
    ),
    "magnitude": Method("single weights by |W|", ("sparsity", "compat"), _magnitude),
    "wanda": Method("single weights by |W| |x|", ("sparsity", "sequential"), _layer_by_layer(Wanda)),
    "sparsegpt": Method(
        "single weights by the error they leave, the rest updated",
        ("sparsity", "sequential", "compat"),
        _layer_by_layer(SparseGPT, "compat"),
    ),
}
"""Every method by the name that ``pvs prune --method`` takes."""
AT_ONCE = tuple(name for name, method in METHODS.items() if not method.trains)
"""The methods that ``pvs prune`` does by itself."""
