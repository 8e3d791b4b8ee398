"""The shared-prefix scan against independent models without the layers, and what depth plans choose."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.nn.modules import module as torch_module
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.ledger.flops import sweep_flops
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.structured.depth import Scan, layers_to_remove, plan_depth, plan_individual, scan_windows
from nemo_pvs.pruning.structured.sweep import LayerSweep
from tests.state_source import StateSource, random_ids, tiny_model

LAYERS = 6


def six_layers(seed: int = 0) -> LlamaForCausalLM:
    return tiny_model(seed=seed, num_hidden_layers=LAYERS)


def token_set(samples: int = 4, length: int = 25) -> TokenSet:
    return TokenSet.from_stream(random_ids(1, samples * length, seed=7)[0].numpy(), sequence_length=length)


def make_scan(losses: tuple[float, ...], dense_loss: float, removed: int = 2) -> Scan:
    shape = shape_of(StateSource(six_layers()))
    return Scan(shape, "f", {"samples": 1}, removed, losses, dense_loss, layer_forwards=1)


def independent_loss(model: LlamaForCausalLM, removed: range, ids: torch.Tensor, batch_size: int) -> float:
    """Delete the layers from a copy of the whole model, run it as transformers does, and average the loss."""
    model = copy.deepcopy(model)
    del model.model.layers[removed.start : removed.stop]
    model.config.num_hidden_layers = len(model.model.layers)
    with torch.no_grad():
        batches = [batch[:, :-1].long() for batch in ids.split(batch_size)]
        states = torch.cat([model.model(batch, use_cache=False).last_hidden_state for batch in batches])
        logits = model.lm_head(states.flatten(0, 1))
        losses = functional.cross_entropy(logits, ids[:, 1:].flatten().long(), reduction="none").double()
    return float(losses.sum()) / losses.numel()


@pytest.mark.slow
@pytest.mark.parametrize("removed", [1, 2, 5])
def test_brute_force_bit_for_bit(removed: int) -> None:
    model, tokens = six_layers(), token_set()
    scan = scan_windows(StateSource(model), tokens, removed, compute=Compute(batch_size=2))
    expected = [
        independent_loss(model, range(start, start + removed), tokens.ids, batch_size=2)
        for start in range(LAYERS - removed + 1)
    ]
    assert list(scan.losses) == expected
    assert scan.dense_loss == independent_loss(model, range(0), tokens.ids, batch_size=2)
    assert scan.start == expected.index(min(expected))


def test_the_plans_model_has_the_loss_that_the_scan_promised() -> None:
    source, tokens = StateSource(six_layers()), token_set()
    scan = scan_windows(source, tokens, 2)
    pruned = PrunedSource(source, plan_depth(scan))
    assert perplexity(pruned, tokens)["loss"] == min(scan.losses)
    assert perplexity(source, tokens)["loss"] == scan.dense_loss


def test_a_layer_that_adds_nothing_is_the_one_to_go() -> None:
    model = six_layers()
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    # The model's own favourite continuations: on random text a random model may gain by losing a layer.
    ids = random_ids(4, 1).long()
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    scan = scan_windows(StateSource(model), TokenSet(ids.int(), {}), 1)
    assert scan.losses[3] == scan.dense_loss
    assert scan.start == 3
    assert all(loss > scan.dense_loss for index, loss in enumerate(scan.losses) if index != 3)


@pytest.mark.parametrize("removed", range(1, LAYERS))
def test_candidates_and_layer_forwards(removed: int) -> None:
    """Count the calls of real decoder layers, and how often each is read."""
    source, tokens = StateSource(six_layers()), token_set()
    calls = 0

    def count(module: torch.nn.Module, *_: object) -> None:
        nonlocal calls
        calls += isinstance(module, LlamaDecoderLayer)

    steps: list[tuple[int, int]] = []
    handle = torch_module.register_module_forward_hook(count)
    try:
        scan = scan_windows(
            source,
            tokens,
            removed,
            compute=Compute(batch_size=4),
            progress=lambda done, total: steps.append((done, total)),
        )
    finally:
        handle.remove()
    kept = LAYERS - removed
    assert len(scan.losses) == kept + 1
    assert scan.layer_forwards == calls == LAYERS + kept * (kept + 1) // 2
    assert steps == [(step, calls) for step in range(1, calls + 1)]
    # Layer 1 of 6 is not among those that the fingerprint reads.
    assert source.reads.count("model.layers.1.mlp.up_proj.weight") == 1
    # Dense model, every candidate, and the winner again.
    assert scan.reference_layer_forwards == LAYERS + (kept + 1) * kept + kept


@pytest.mark.slow
def test_a_smollm2_sized_scan_takes_about_half_of_the_reference() -> None:
    """30 layers, 16 to remove: 30 + 14 * 15 / 2 = 135 of 254."""
    source = StateSource(tiny_model(num_hidden_layers=30, hidden_size=8, intermediate_size=8))
    scan = scan_windows(source, token_set(samples=1, length=4), 16)
    assert (scan.layer_forwards, scan.reference_layer_forwards) == (135, 254)
    assert scan.layer_forwards <= 0.55 * scan.reference_layer_forwards


def test_several_sweeps_give_the_losses_of_one() -> None:
    source, tokens = StateSource(six_layers()), token_set(samples=8)
    one = scan_windows(source, tokens, 2, compute=Compute(batch_size=2))
    per_sequence = 25 * 64 * 4
    # Six states (five candidates and the dense model) of two sequences each.
    several = scan_windows(source, tokens, 2, compute=Compute(batch_size=2, memory_limit=6 * 2 * per_sequence))
    assert source.reads.count("model.layers.1.mlp.up_proj.weight") == 1 + 4
    assert several.losses == pytest.approx(one.losses, rel=1e-6)
    assert several.layer_forwards == one.layer_forwards


def test_the_lowest_loss_wins_the_first_of_equals_even_below_the_dense_loss() -> None:
    assert make_scan((3.0, 2.5, 2.5, 2.7, 4.0), dense_loss=2.6).start == 1
    # The nearest to the dense loss would be the fourth.
    plan = plan_depth(make_scan((3.0, 2.4, 2.5, 2.61, 4.0), dense_loss=2.6))
    assert plan.keep_layers == (0, 3, 4, 5)
    assert plan_depth(make_scan((3.0, 2.4, 2.5, 2.61, 4.0), dense_loss=2.6), compat=True).keep_layers == (0, 1, 2, 5)


def test_the_reference_measures_nearness_in_perplexity_the_first_of_equals() -> None:
    """2.0 is 0.6 nats from 2.6 and 3.1 only 0.5, but exp(2.6) - exp(2.0) = 6.1 and exp(3.1) - exp(2.6) = 8.7."""
    scan = make_scan((3.1, 2.0, 3.1, 2.0, 9.0), dense_loss=2.6)
    assert scan.nearest_start == 1
    assert make_scan((800.0, 900.0, 5.0, 1000.0, 2000.0), dense_loss=2.0).nearest_start == 2


@pytest.mark.parametrize(("best", "kept"), [(0, (2, 3, 4, 5)), (2, (0, 1, 4, 5)), (4, (0, 1, 2, 3))])
def test_plans_keep_the_layers_around_the_run(best: int, kept: tuple[int, ...]) -> None:
    losses = tuple(1.0 if start == best else 2.0 for start in range(5))
    plan = plan_depth(make_scan(losses, 0.5))
    assert plan.keep_layers == kept
    assert plan.target == plan.parent.replace(layers=4)
    assert plan.provenance["losses"] == list(losses)


def test_the_scan_names_its_model_and_text() -> None:
    source, tokens = StateSource(six_layers()), token_set()
    plan = plan_depth(scan_windows(source, tokens, 3))
    assert plan.provenance["model_fingerprint"] == fingerprint(source)
    assert plan.provenance["tokens"] == tokens.manifest


def test_single_layers_go_by_their_own_losses() -> None:
    scan = make_scan((3.0, 2.0, 2.5, 2.0, 2.2, 4.0), dense_loss=1.0, removed=1)
    assert plan_individual(scan, 3).keep_layers == (0, 2, 5)
    assert plan_individual(scan, 1).keep_layers == (0, 2, 3, 4, 5)
    assert plan_individual(scan, 2, protect_first=2, protect_last=2).keep_layers == (0, 1, 4, 5)
    assert plan_individual(scan, 1, protect_first=2).target == scan.shape.replace(layers=5)
    with pytest.raises(UserError, match="keep the first 4 and the last 1; protect fewer"):
        plan_individual(scan, 2, protect_first=4, protect_last=1)
    with pytest.raises(UserError, match="needs a scan of single layers, not of runs of 2"):
        plan_individual(make_scan((1.0,) * 5, 1.0), 1)


def test_a_sweep_over_layers_that_are_left_equals_models_without_the_others() -> None:
    """Layers 1 and 4 are gone already; runs of two of the other four."""
    model, tokens = six_layers(), token_set()
    sweep = LayerSweep(StateSource(model), tokens, compute=Compute(batch_size=2))
    losses, whole = sweep.losses([0, 2, 3, 5], 2, [2, 0])
    for start, kept in ((0, [3, 5]), (2, [0, 2]), (None, [0, 2, 3, 5])):
        smaller = copy.deepcopy(model)
        smaller.model.layers = torch.nn.ModuleList([smaller.model.layers[layer] for layer in kept])
        smaller.config.num_hidden_layers = len(kept)
        expected = independent_loss(smaller, range(0), tokens.ids, batch_size=2)
        assert (whole if start is None else losses[start]) == expected
    assert sweep.layer_forwards == 4 + 2
    alone, nothing = sweep.losses([0, 2, 3, 5], 2, [2, 0], whole=False)
    assert nothing is None
    assert alone == losses
    # The whole model is followed only up to the last candidate's start.
    assert sweep.layer_forwards == 6 + 2 + 2


@pytest.mark.parametrize("remove", [0, 6, 7, -1])
def test_removing_nothing_or_everything_is_refused(remove: int) -> None:
    with pytest.raises(UserError, match=rf"Cannot remove {remove} of 6 layers; choose from 1 to 5"):
        scan_windows(StateSource(six_layers()), token_set(), remove)


def test_a_broken_model_is_reported() -> None:
    model = six_layers()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite during the depth scan"):
        scan_windows(StateSource(model), token_set(), 2)


def test_layers_to_remove() -> None:
    parent = Shape(layers=30, hidden=64, ffn=96, heads=8, kv_groups=2, head_dim=16, vocab=128, tied=True)
    assert layers_to_remove(parent, replace(parent, layers=14)) == 16
    with pytest.raises(UserError, match="in width"):
        layers_to_remove(parent, replace(parent, layers=14, hidden=32))


def test_scan_charges_the_layers_that_ran_and_every_head():
    """By hand: 3 layers, one removed, 2 windows of 5 tokens; d=4, f=6, H=2, G=1, h=2, V=10."""
    shape = Shape(layers=3, hidden=4, ffn=6, heads=2, kv_groups=1, head_dim=2, vocab=10, tied=True)
    tokens = {"samples": 2, "sequence_length": 5}
    scan = Scan(shape, "", tokens, removed=1, losses=(1.0, 2.0, 3.0), dense_loss=0.5, layer_forwards=6)
    layer = 2 * (2 * 4 * 2 * (2 + 1) + 3 * 4 * 6) + 2 * 5 * 2 * 2
    head = 2 * 10 * 4
    assert scan.tokens_read == 40
    assert scan.flops == 10 * (6 * layer + 4 * head)


def test_uneven_layers_are_charged_as_their_mean():
    """By hand: ffn 6 and 12, so a layer costs the mean of the two."""
    shape = Shape(layers=1, hidden=4, ffn=6, heads=2, kv_groups=1, head_dim=2, vocab=10, tied=True)
    small = shape.layer_sizes[0]
    shape = shape.with_layers([small, small._replace(ffn=12)])
    attention, head = 2 * 4 * 2 * 2 * (2 + 1) + 2 * 5 * 2 * 2, 2 * 10 * 4
    mean = attention + 2 * 3 * 4 * 9
    assert sweep_flops(shape, {"samples": 3, "sequence_length": 5}, 7, 2) == 15 * (7 * mean + 2 * head)
