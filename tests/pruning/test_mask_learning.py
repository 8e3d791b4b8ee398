"""Learned masks: they reach the target, what is of no use goes, an interrupted learner goes on to the bit."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from nemo_pvs.checkpoints.masks import check_masks
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.learned.gates import UNITS, FoldedSource, Gates, gate_sizes, plan_of_gates
from nemo_pvs.pruning.learned.mask_learning import MaskLearner, MaskSettings
from nemo_pvs.pruning.learned.sheared import check_reached, load_gates, save_masks, sheared_plan
from tests.masked_source import MaskedSource
from tests.pruning.gated_llama import gated
from tests.pruning.test_apply import IDS
from tests.state_source import StateSource, as_transformers, tiny_model

PARENT = shape_of(StateSource(tiny_model()))
TARGET = PARENT.replace(hidden=48, ffn=40, kv_groups=1, layers=3)
QUICK = MaskSettings(target_warmup_steps=100)


def no_gradients(shape: Shape) -> Gates:
    return Gates(**{unit: torch.zeros(size) for unit, size in gate_sizes(shape).items()})


def learned(steps: int, settings: MaskSettings = QUICK, gradients: Gates | None = None) -> MaskLearner:
    masks = MaskLearner(PARENT, TARGET, settings)
    for step in range(steps):
        masks.learn(step, gradients or no_gradients(PARENT))
    return masks


def test_axes_that_stay_whole_have_gates_of_one() -> None:
    masks = MaskLearner(PARENT, PARENT.replace(ffn=40), QUICK)
    for gates in (masks.draw(0), masks.deterministic()):
        assert all((one == 1).all() for unit, one in zip(UNITS, gates.tensors, strict=True) if unit != "ffn")
        assert not (gates.ffn == 1).all()


def test_noise_belongs_to_the_step() -> None:
    one, other = (MaskLearner(PARENT, TARGET, QUICK) for _ in range(2))
    other.draw(3)
    torch.manual_seed(5)
    for left, right in zip(one.draw(7).tensors, other.draw(7).tensors, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert not torch.equal(one.draw(7).ffn, one.draw(8).ffn)
    assert not torch.equal(one.draw(7).ffn, MaskLearner(PARENT, TARGET, MaskSettings(seed=1)).draw(7).ffn)


def test_multipliers_climb_in_the_direction_that_closes_the_gap() -> None:
    masks = learned(2, MaskSettings(target_warmup_steps=0))
    for unit in UNITS:
        first, second = masks.multipliers[unit].tolist()
        assert first < 0 < second, unit  # too few units are zero: both terms push log alpha down
    before = masks.sparsities()
    for step in range(2, 20):
        masks.learn(step, no_gradients(PARENT))
    assert all(masks.sparsities()[unit] > before[unit] for unit in UNITS)


def test_the_target_comes_in_slowly() -> None:
    """One step: halfway through the warm-up the constraint asks for half of the sparsity."""
    masks = MaskLearner(PARENT, TARGET, MaskSettings(target_warmup_steps=10))
    with torch.no_grad():
        masks.multipliers["ffn"].copy_(torch.tensor([0.0, 1.0]))
        sparsity = masks.sparsities()["ffn"]
        assert float(masks._penalty("ffn", 5)) == pytest.approx((sparsity - masks.targets["ffn"] / 2) ** 2, rel=1e-2)
        assert float(masks._penalty("ffn", 50)) == pytest.approx((sparsity - masks.targets["ffn"]) ** 2, rel=1e-2)


@pytest.mark.slow
def test_without_a_loss_every_kind_of_unit_reaches_its_target() -> None:
    masks = learned(500)
    for unit, sparsity in masks.sparsities().items():
        assert sparsity == pytest.approx(masks.targets[unit], abs=0.01), unit


def test_planted_useless_channels_are_the_ones_that_go() -> None:
    parent = PARENT.replace(hidden=16)
    masks = MaskLearner(parent, parent.replace(hidden=8), MaskSettings(target_warmup_steps=60))
    generator = torch.Generator().manual_seed(0)
    useful = torch.randperm(16, generator=generator)[:8]
    weights = torch.zeros(16).index_fill(0, useful, 5.0)
    inputs = torch.randn(64, 16, generator=generator)
    for step in range(300):
        gates = masks.draw(step).hidden.requires_grad_()
        (((inputs * gates) @ weights - inputs @ weights) ** 2).mean().backward()
        masks.learn(step, Gates(gates.grad, *no_gradients(parent).tensors[1:]))
    assert masks.deterministic().hidden.nonzero().flatten().tolist() == sorted(useful.tolist())


def test_a_restored_learner_goes_on_to_the_bit() -> None:
    gradients = Gates(**{unit: torch.randn(size) for unit, size in gate_sizes(PARENT).items()})
    whole, half = learned(30, gradients=gradients), learned(15, gradients=gradients)
    resumed = MaskLearner(PARENT, TARGET, QUICK)
    resumed.load_state_dict(half.state_dict())
    for step in range(15, 30):
        resumed.learn(step, gradients)
    for unit in UNITS:
        torch.testing.assert_close(resumed.log_alpha[unit], whole.log_alpha[unit], rtol=0, atol=0)
        torch.testing.assert_close(resumed.multipliers[unit], whole.multipliers[unit], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("biases", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
def test_the_exported_model_is_the_gated_one(biases: dict) -> None:
    model = tiny_model(seed=3, **biases)
    parent = shape_of(StateSource(model))
    gradients = Gates(**{unit: torch.randn(size) for unit, size in gate_sizes(parent).items()})
    masks = MaskLearner(parent, parent.replace(hidden=48, ffn=40, kv_groups=1, layers=3), QUICK)
    for step in range(300):
        masks.learn(step, gradients)
    gates = masks.deterministic()
    # Far from one, so that a factor that is missing or there twice shows.
    gates = Gates(*(one * torch.rand(one.shape).clamp(0.3, 0.8) for one in gates.tensors))
    pruned, plan = sheared_plan(StateSource(model), gates, {})
    assert plan.target == masks.target
    with torch.no_grad():
        sliced = as_transformers(pruned)(IDS).logits
        torch.testing.assert_close(sliced, gated(model, lambda: gates)(IDS).logits, rtol=0, atol=1e-5)


def test_folding_rounds_once_and_leaves_embedding_and_head_alone() -> None:
    model = tiny_model().to(torch.bfloat16)
    gates = Gates(**{unit: torch.full(size, 0.9) for unit, size in gate_sizes(PARENT).items()})
    folded, plain = FoldedSource(StateSource(model), gates), StateSource(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(folded.read(name), plain.read(name))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(folded.read(name), (plain.read(name).float() * (torch.tensor(0.9) * 0.9)).bfloat16())


def test_a_sparse_parent_stays_sparse() -> None:
    """Without the masks, training would fill the zeros of the pruned model."""
    gates = learned(30).deterministic()
    source = MaskedSource(StateSource(tiny_model()))
    pruned, plan = sheared_plan(source, gates, {})
    assert set(pruned.masks.names) == {name for name in pruned.masks.names if name.endswith("proj.weight")} != set()
    check_masks(pruned)
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = torch.tensor(plan.keep_hidden), torch.tensor(plan.keep_ffn[0])
    parent = f"model.layers.{plan.keep_layers[0]}.mlp.down_proj.weight"
    assert torch.equal(pruned.masks.read(name), source.masks.read(parent)[rows][:, columns])


def test_masks_that_did_not_reach_the_target_say_how_far_they_got(tmp_path: Path) -> None:
    save_masks(tmp_path / "masks", learned(5))
    with pytest.raises(UserError, match=r"would remove \d.*% of the hidden channels instead of 25.0%"):
        load_gates(tmp_path / "masks", TARGET)


def test_masks_may_miss_the_target_by_one_unit() -> None:
    gates = MaskLearner(PARENT, TARGET, QUICK).deterministic()
    for unit in UNITS:
        one_unit = 1 / getattr(gates, unit).shape[-1]
        allowed = max(0.02, one_unit)
        check_reached({unit: 0.25 + allowed}, {unit: 0.25}, gates)
        check_reached({unit: 0.25 - allowed}, {unit: 0.25}, gates)
        with pytest.raises(UserError, match="did not reach"):
            check_reached({unit: 0.25 + 1.1 * allowed}, {unit: 0.25}, gates)


@pytest.mark.slow
def test_masks_are_read_back_for_their_own_target_only(tmp_path: Path) -> None:
    masks = learned(500)
    save_masks(tmp_path / "masks", masks)
    for found, one in zip(load_gates(tmp_path / "masks", TARGET).tensors, masks.deterministic().tensors, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=0)
    with pytest.raises(UserError, match="were learned for"):
        load_gates(tmp_path / "masks", TARGET.replace(ffn=41))
    with pytest.raises(UserError, match="does not hold learned masks"):
        load_gates(tmp_path / "nothing", TARGET)


@pytest.mark.parametrize("unit", ["hidden", "ffn", "groups", "layers"])
def test_gates_that_leave_nothing_make_no_plan(unit: str) -> None:
    gates = {one: torch.ones(size) for one, size in gate_sizes(PARENT).items()}
    gates[unit][0 if gates[unit].ndim > 1 else slice(None)] = 0
    with pytest.raises(UserError, match="The gates leave no"):
        plan_of_gates("test", PARENT, Gates(**gates), {})


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (PARENT.replace(ffn=100), "more FFN channels"),
        (PARENT, "nothing to learn"),
    ],
)
def test_impossible_targets_are_refused(target: Shape, words: str) -> None:
    with pytest.raises(UserError, match=words):
        MaskLearner(PARENT, target, QUICK)


@pytest.mark.slow
def test_planted_units_of_a_llama_are_the_ones_that_go() -> None:
    """A layer, a KV group a layer, and 56 FFN channels a layer add nothing: weights stay, masks find them."""
    model = tiny_model(seed=7).requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(0)
    sizes = gate_sizes(PARENT)
    planted = {unit: torch.ones(sizes[unit], dtype=torch.bool) for unit in ("groups", "ffn", "layers")}
    planted["layers"][2] = False
    for index, layer in enumerate(model.model.layers):
        group = int(torch.randint(2, (), generator=generator))
        channels = torch.randperm(PARENT.ffn, generator=generator)[: PARENT.ffn - 40]
        planted["groups"][index, group], planted["ffn"][index, channels] = False, False
        width = PARENT.axis("query") // PARENT.kv_groups
        layer.self_attn.o_proj.weight[:, group * width : (group + 1) * width] = 0
        layer.mlp.down_proj.weight[:, channels] = 0
    for block in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        block.weight.zero_()
    expected = model(IDS).logits.softmax(-1)
    masks = MaskLearner(PARENT, PARENT.replace(ffn=40, kv_groups=1, layers=3), MaskSettings(0.3, 0.3, 80))
    current: list[Gates] = []
    gated(model, lambda: current[-1])
    for step in range(300):
        current.append(masks.draw(step).requires_grad_())
        cross_entropy(model(IDS).logits.flatten(0, 1), expected.flatten(0, 1)).backward()
        zeros = (torch.zeros_like(one) if one.grad is None else one.grad for one in current[-1].tensors)
        masks.learn(step, Gates(*zeros), schedule=min(1.0, (300 - step) / 200))
    gates = masks.deterministic()
    assert torch.equal(gates.layers != 0, planted["layers"])
    kept = planted["layers"]
    assert torch.equal((gates.groups != 0)[kept], planted["groups"][kept])
    assert float(((gates.ffn != 0) == planted["ffn"])[kept].float().mean()) > 0.99
