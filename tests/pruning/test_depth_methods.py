"""minitron-depth and shortgpt from their options: protected layers, what is said, parents with uneven layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.prune import prune
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.pruning.request import PruneRequest, Scored
from nemo_pvs.pruning.result import Pruned
from nemo_pvs.pruning.structured.depth import scan_windows
from tests.pruning.test_depth import LAYERS, six_layers, token_set
from tests.state_source import StateSource
from tests.uneven_model import SIZES, uneven_model


def pruned_by(
    method: str,
    source: WeightSource,
    said: list[str] | None = None,
    *,
    check: Callable[[Shape], None] = lambda _: None,
    measured: Callable[[], Any] = token_set,
    **options: Any,
) -> Pruned:
    """Prune; text and scores come from ``measured``, and a task's score is minus the loss."""

    def score(model: WeightSource) -> Scored:
        return Scored(-perplexity(model, token_set())["loss"], {})

    request = PruneRequest(
        source=source,
        options=method_named(method).options.parse(method, options),
        tokens=measured,
        scores=lambda: calibrate(source, measured()),
        check=check,
        work_folder=None,  # type: ignore[arg-type]
        progress=lambda *_: nullcontext(lambda *_: None),
        say=([] if said is None else said).append,
        task_score=lambda: score,
    )
    return prune(method, request).pruned


def removed(pruned: Pruned) -> list[int]:
    assert pruned.plan is not None
    return sorted({*range(pruned.plan.parent.layers)} - {*pruned.plan.keep_layers})


@pytest.mark.parametrize("options", [{}, {"compat": True}, {"task": "any"}, {"search": "individual"}])
def test_protected_layers_are_kept_by_every_search(options: dict[str, Any]) -> None:
    """The best pair of layers is at an end, which only protection keeps."""
    source, tokens = StateSource(six_layers(seed=1)), token_set()
    losses = scan_windows(source, tokens, 2).losses
    best = losses.index(min(losses))
    first, last = (best + 1, 0) if best < 3 else (0, LAYERS - best - 1)
    gone = removed(pruned_by("minitron-depth", source, layers=4, protect_first=first, protect_last=last, **options))
    assert gone[0] >= first
    assert gone[1] < LAYERS - last
    if options in ({}, {"task": "any"}):
        assert removed(pruned_by("minitron-depth", source, layers=4, **options)) == [best, best + 1]
        allowed = range(first, LAYERS - last - 1)
        assert gone[0] == min(allowed, key=losses.__getitem__)


@pytest.mark.parametrize("compat", [False, True])
def test_the_loss_that_is_said_is_that_of_the_layers_that_are_removed(compat: bool) -> None:
    source, said = StateSource(six_layers()), list[str]()
    pruned = pruned_by("minitron-depth", source, said, layers=4, compat=compat)
    gone, loss = removed(pruned), perplexity(pruned.source, token_set())["loss"]
    assert f"without layers {gone[0]} to {gone[1]} the loss is {loss:.3f}" in said[-1]


@pytest.mark.parametrize(("method", "options"), [("shortgpt", {}), ("minitron-depth", {"search": "individual"})])
def test_too_many_protected_layers_are_refused_before_anything_is_measured(
    method: str, options: dict[str, Any]
) -> None:
    def measure() -> Any:
        pytest.fail("it read text")

    source = StateSource(six_layers())
    with pytest.raises(UserError, match="Cannot remove 4 of 6 layers and keep the first 2 and the last 1"):
        pruned_by(method, source, measured=measure, layers=2, protect_first=2, protect_last=1, **options)


@pytest.mark.parametrize(("ratio", "layers"), [(0.25, 3), (0.5, 2), (0.75, 1)])
def test_uneven_layers_count_as_their_mean(ratio: float, layers: int) -> None:
    """Their bounds are twice as large, so that three layers of that size would be more than the model has."""
    source = StateSource(uneven_model())
    parent = shape_of(source)
    options = method_named("minitron-depth").options.parse("minitron-depth", {"ratio": ratio})
    expected = method_named("minitron-depth").expected
    assert expected is not None
    shape, exact, _ = expected(options, parent)
    assert (shape.layers, exact) == (layers, False)
    wanted = parent.parameters - (4 - layers) / 4 * (parent.matrix_parameters + parent.vector_parameters)
    assert shape.parameters == pytest.approx(wanted, rel=0.01)
    assert shape_of(pruned_by("minitron-depth", source, ratio=ratio).source).layers == layers


def test_the_target_of_uneven_layers_is_that_of_the_layers_that_are_kept() -> None:
    said: list[str] = []
    checked: list[Shape] = []
    pruned = pruned_by("minitron-depth", StateSource(uneven_model()), said, check=checked.append, layers=3)
    assert pruned.plan is not None
    shape = shape_of(pruned.source)
    assert shape.layer_sizes == tuple(SIZES[layer] for layer in pruned.plan.keep_layers)
    assert checked == [shape]
    assert any(text.startswith(f"target: {shape}; removes ") for text in said)
