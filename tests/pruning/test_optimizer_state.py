"""Optimizer state that goes through pruning is that of the unpruned training, element by element."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import LlamaForCausalLM

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.nemo.optimizer_state import OptimizerStateSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.optimizer_state import slice_optimizer_state
from nemo_pvs.pruning.plan import Plan
from tests.pruning.test_plan import make_plan, with_means
from tests.state_source import StateSource, random_ids, tiny_model


class TensorSource:
    """Tensors in memory under the names of a model's weights."""

    assets: tuple[Path, ...] = ()

    def __init__(self, model: LlamaForCausalLM, tensors: dict[str, torch.Tensor]) -> None:
        self.config: dict[str, Any] = model.config.to_dict()
        self.read = tensors.__getitem__


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        ids = random_ids(2, 12, seed=step).long()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def adamw(model: LlamaForCausalLM) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def states(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, state: str) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[weight][state].clone() for name, weight in model.named_parameters()}


def save(model: LlamaForCausalLM, kinds: dict[str, dict[str, torch.Tensor]], folder: Path) -> Path:
    """Write weights and states as Megatron's optimizers do: each state fused and stacked like the weights."""
    write_nemo(StateSource(model), folder)
    stored = _stored(folder)
    for kind, tensors in kinds.items():
        write_nemo(TensorSource(model, tensors), folder.parent / kind)
        stored |= {f"optimizer.state.{kind}.{name}": value for name, value in _stored(folder.parent / kind).items()}
    for file in ("__0_0.distcp", ".metadata"):
        (folder / "weights" / file).unlink()
    dcp.save(stored, checkpoint_id=folder / "weights", no_dist=True)
    return folder


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(folder / "weights")
    return {name: reader.read(name, (0,) * len(reader.size(name)), reader.size(name)) for name in reader.names}


@pytest.fixture(name="trained", scope="module")
def trained_fixture(tmp_path_factory) -> tuple[LlamaForCausalLM, torch.optim.Optimizer, Path]:
    model = tiny_model(std=0.05)
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    kinds = {state: states(model, optimizer, state) for state in ("exp_avg", "exp_avg_sq")}
    kinds["param"] = {name: weight.detach() + 1 for name, weight in model.named_parameters()}
    return model, optimizer, save(model, kinds, tmp_path_factory.mktemp("trained") / "nemo")


def rows_of(units: Sequence[int], size: int) -> list[int]:
    return [unit * size + place for unit in units for place in range(size)]


def kept_by_hand(name: str, tensor: torch.Tensor, plan: Plan, layer: int) -> torch.Tensor:
    """Slice a tensor of Llama's by what its name says, without the weight table."""
    shape, hidden = plan.parent, list(plan.keep_hidden)
    groups = plan.keep_kv_groups[layer]
    heads = plan.keep_heads[layer] if plan.keep_heads else rows_of(groups, shape.heads_per_group)
    rows = {
        "q_proj": rows_of(heads, shape.head_dim),
        "k_proj": rows_of(groups, shape.head_dim),
        "v_proj": rows_of(groups, shape.head_dim),
        "gate_proj": list(plan.keep_ffn[layer]),
        "up_proj": list(plan.keep_ffn[layer]),
    }
    columns = {"o_proj": rows["q_proj"], "down_proj": rows["gate_proj"]}
    module = name.split(".")[-2]
    if tensor.ndim == 1:
        return tensor[hidden]
    if module in columns:
        return tensor[hidden][:, columns[module]]
    return (tensor[rows[module]] if module in rows else tensor)[:, hidden]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"kv_groups": 1, "heads": 2}], ids=["groups", "heads"])
def test_kept_units_have_the_states_of_the_unpruned_training_bit_by_bit(sizes, trained):
    model, optimizer, folder = trained
    source = NemoSource(folder)
    plan = replace(make_plan(shape_of(source), **sizes), provenance={"model_fingerprint": fingerprint(source)})
    sliced = slice_optimizer_state(folder, plan)
    assert list(sliced) == ["exp_avg", "exp_avg_sq", "param"]
    for state, pruned in sliced.items():
        whole = (
            {name: weight.detach() + 1 for name, weight in model.named_parameters()}
            if state == "param"
            else states(model, optimizer, state)
        )
        for name, tensor in whole.items():
            new, layer = name, 0
            if ".layers." in name:
                before = int(name.split(".")[2])
                if before not in plan.keep_layers:
                    continue
                layer = plan.keep_layers.index(before)
                new = name.replace(f".{before}.", f".{layer}.", 1)
            assert torch.equal(pruned.read(new), kept_by_hand(name, tensor, plan, layer)), f"{state} of {name}"


def test_a_plan_that_keeps_all_goes_on_like_the_training_that_was_not_interrupted(trained):
    model, optimizer, folder = trained
    shape = shape_of(NemoSource(folder))
    plan = make_plan(shape, layers=shape.layers, hidden=shape.hidden, ffn=shape.ffn, kv_groups=shape.kv_groups)
    sliced = slice_optimizer_state(folder, plan)
    ends = []
    for carried in (True, False):
        again = tiny_model()
        again.load_state_dict(model.state_dict())
        other = adamw(again)
        if carried:
            for name, weight in again.named_parameters():
                moments = {state: sliced[state].read(name) for state in ("exp_avg", "exp_avg_sq")}
                other.state[weight] = {"step": torch.tensor(3.0), **moments}
        train(again, other, range(3, 6))
        ends.append(torch.cat([weight.detach().flatten() for weight in again.parameters()]))
    whole = tiny_model()
    whole.load_state_dict(model.state_dict())
    other = adamw(whole)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or both would share their tensors
    train(whole, other, range(3, 6))
    expected = torch.cat([weight.detach().flatten() for weight in whole.parameters()])
    assert float((ends[0] - expected).abs().max()) <= 1e-6
    assert float((ends[1] - expected).abs().max()) > 1e-3, "restarted moments would pass, too"


@pytest.mark.slow
def test_refusals(trained, tmp_path):
    model, _, folder = trained
    plan = make_plan(shape_of(NemoSource(folder)))
    write_nemo(StateSource(model), tmp_path / "weights-only")
    with pytest.raises(UserError, match=r"has no optimizer\.state\.exp_avg\..* restart the optimizer"):
        slice_optimizer_state(tmp_path / "weights-only", plan)
    with pytest.raises(UserError, match="other weights"):
        slice_optimizer_state(folder, replace(plan, provenance={"model_fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="adds biases"):
        slice_optimizer_state(folder, with_means(plan))
    merging = replace(
        make_plan(plan.parent, heads=6), keep_heads=((0, 1, 2, 4, 5, 6),) * 3, merged_heads=(((2, 3),),) * 3
    )
    with pytest.raises(UserError, match="merges query heads, whose moments cannot be merged"):
        slice_optimizer_state(folder, merging)
    with pytest.raises(UserError, match=r"has no optimizer\.state\.fp32_param"):
        OptimizerStateSource(folder, "fp32_param")
