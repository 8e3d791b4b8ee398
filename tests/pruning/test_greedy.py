"""Greedy removal against a loop over independent models, and its count of the work."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.ledger.flops import count_forwards
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.methods.minitron_depth import MinitronDepthOptions
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.pruning.request import PruneRequest
from nemo_pvs.pruning.structured.greedy import plan_greedy, scan_greedy
from tests.pruning.test_depth import LAYERS, independent_loss, six_layers, token_set
from tests.state_source import StateSource, tiny_model


def _planned(model: LlamaForCausalLM, tokens: TokenSet, **options: Any) -> Plan:
    """Return the plan of ``minitron-depth`` without four layers, as ``pvs prune`` and ``pvs run`` make it."""
    job = PruneRequest(
        StateSource(model),
        MinitronDepthOptions(layers=LAYERS - 4, **options),
        tokens=lambda: tokens,
        scores=lambda: pytest.fail("no scores are needed"),
        check=lambda shape: None,
        work_folder=Path("unused"),
        progress=lambda *_: nullcontext(None),
        say=lambda text: None,
    )
    plan = method_named("minitron-depth").prune(job).plan
    assert plan is not None
    return plan


def without(model: LlamaForCausalLM, layer: int) -> LlamaForCausalLM:
    model = copy.deepcopy(model)
    del model.model.layers[layer]
    model.config.num_hidden_layers -= 1
    return model


def brute_force(model: LlamaForCausalLM, ids: torch.Tensor, remove: int, first: int, last: int) -> list[Any]:
    """Build and run every model of every step; return the layers in order of removal, and all losses."""
    names = list(range(LAYERS))
    removed, steps = [], []
    for _ in range(remove):
        places = range(first, len(names) - last)
        losses = {names[place]: independent_loss(without(model, place), range(0), ids, 2) for place in places}
        best = min(losses, key=losses.__getitem__)
        model = without(model, names.index(best))
        names.remove(best)
        removed.append(best)
        steps.append(losses)
    return [tuple(removed), tuple(steps)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remove", "first", "last", "seed"), [(1, 0, 0, 0), (5, 0, 0, 0), (4, 0, 0, 3), (3, 1, 1, 3), (2, 2, 0, 0)]
)
def test_brute_force_bit_for_bit(remove: int, first: int, last: int, seed: int) -> None:
    model, tokens = six_layers(seed), token_set()
    scan = scan_greedy(
        StateSource(model), tokens, remove, protect_first=first, protect_last=last, compute=Compute(batch_size=2)
    )
    assert [scan.removed, scan.losses] == brute_force(model, tokens.ids, remove, first, last)
    assert scan.dense_loss == independent_loss(model, range(0), tokens.ids, 2)


@pytest.mark.slow
def test_sleb_never_removes_the_first_or_the_last_layer() -> None:
    """The loop of SLEB's sleb.py tries all layers that are left but the first and the last."""
    model, tokens = six_layers(), token_set()
    for search, ends in (("sleb", (1, 1)), ("greedy", (0, 0))):
        made = _planned(model, tokens, search=search)
        removed, _ = brute_force(model, tokens.ids, 4, *ends)
        assert made.provenance["order"] == list(removed)
        assert made.provenance["settings"]["search"] == search
    assert {0, LAYERS - 1} <= set(_planned(model, tokens, search="sleb").keep_layers)
    assert _planned(model, tokens, search="sleb", protect_first=0, protect_last=2).provenance["order"] == list(
        brute_force(model, tokens.ids, 4, 0, 2)[0]
    )


def test_the_plans_model_has_the_loss_of_the_last_step() -> None:
    source, tokens = StateSource(six_layers()), token_set()
    scan = scan_greedy(source, tokens, 3)
    plan = plan_greedy(scan)
    assert set(plan.keep_layers) == set(range(LAYERS)) - set(scan.removed)
    assert perplexity(PrunedSource(source, plan), tokens)["loss"] == scan.losses[-1][scan.removed[-1]]
    assert plan.provenance["losses"][-1] == scan.losses[-1][scan.removed[-1]]
    assert plan.provenance["model_fingerprint"] == fingerprint(source)
    assert plan.provenance["order"] == list(scan.removed)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1)])
def test_the_beginning_of_a_scan_is_the_scan_for_fewer(first: int, last: int) -> None:
    source, tokens = StateSource(six_layers()), token_set()
    long = scan_greedy(source, tokens, 4, protect_first=first, protect_last=last)
    for remove in (1, 2, 4):
        assert long.first(remove) == scan_greedy(source, tokens, remove, protect_first=first, protect_last=last)
    for remove in (0, 5):
        with pytest.raises(UserError, match=f"removed 4 layers, not {remove}"):
            long.first(remove)


def test_work_is_counted_and_reported() -> None:
    """6 layers, 3 go: step by step 6 + 15, 4 + 10 and 3 + 6 forwards; one by one 6 + 6 * 5 + 5 * 4 + 4 * 3."""
    steps: list[tuple[int, int]] = []
    scan = scan_greedy(
        StateSource(six_layers()), token_set(), 3, progress=lambda done, total: steps.append((done, total))
    )
    assert scan.layer_forwards == 21 + 14 + 9
    assert scan.reference_layer_forwards == 68
    assert steps == [(step, 44) for step in range(1, 45)]
    assert scan.models == 1 + 6 + 5 + 4
    assert scan.tokens_read == 4 * 25 * 16


@pytest.mark.slow
def test_a_smollm2_sized_scan_takes_at_most_55_percent_of_the_reference() -> None:
    """30 layers, 3 to go, really run; and 16 to go, counted."""
    source = StateSource(tiny_model(num_hidden_layers=30, hidden_size=8, intermediate_size=8))
    scan = scan_greedy(source, token_set(samples=1, length=4), 3)
    for remove in (3, 16):
        ours = sum(count_forwards(30 - step, 1, range(30 - step), whole=step == 0) for step in range(remove))
        reference = 30 + sum((30 - step) * (29 - step) for step in range(remove))
        assert ours <= 0.55 * reference
        if remove == 3:
            assert (scan.layer_forwards, scan.reference_layer_forwards) == (ours, reference)


@pytest.mark.slow
def test_memory_bounds_the_states_that_are_held_at_once() -> None:
    source, tokens = StateSource(six_layers()), token_set(samples=8)
    whole = scan_greedy(source, tokens, 3, compute=Compute(batch_size=2))
    assert source.reads.count("model.embed_tokens.weight") == 3
    # Seven states (six candidates and the dense model) of two sequences; later steps have one and two states fewer,
    # which is too little for three sequences.
    several = scan_greedy(source, tokens, 3, compute=Compute(batch_size=2, memory_limit=7 * 2 * 25 * 64 * 4))
    assert source.reads.count("model.embed_tokens.weight") == 3 + 3 * 4
    assert several.removed == whole.removed
    assert several.layer_forwards == whole.layer_forwards
    for step, same in zip(several.losses, whole.losses, strict=True):
        assert step == pytest.approx(same, rel=1e-6)


@pytest.mark.parametrize(
    ("remove", "protect", "message"),
    [
        (0, (0, 0), "Cannot remove 0 of 6 layers; choose from 1 to 5"),
        (6, (0, 0), "Cannot remove 6 of 6 layers"),
        (4, (2, 1), "keep the first 2 and the last 1; protect fewer layers"),
        (1, (-1, 0), "protect fewer"),
    ],
)
def test_impossible_removals_are_refused(remove: int, protect: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scan_greedy(StateSource(six_layers()), token_set(), remove, protect_first=protect[0], protect_last=protect[1])
