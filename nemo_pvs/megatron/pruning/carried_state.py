"""Carry optimizer state over a pruning step: keep the moments and fp32 weights of the weights that the plan keeps.

Each kept weight keeps its own AdamW moments, so a run that prunes nothing continues as if it had not been interrupted.
Adapt-Pruner (2502.03460) resets the moments in each round; so does a recipe by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import lightning.pytorch as pl
import nemo_run as run
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from nemo.lightning.io import IOMixin

from nemo_pvs.checkpoints.nemo.optimizer_state import MASTERS, MOMENTS
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.megatron.masks.optimizer import owned, refuse_unfit, unchained
from nemo_pvs.megatron.parameter_entries import gpt_models, parameter_entries
from nemo_pvs.model.layout import Entry, Layout
from nemo_pvs.pruning.optimizer_state import slice_optimizer_state
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.training.checkpoints import state_to_carry
from nemo_pvs.training.job import TrainingJob


def carry_optimizer_state(job: TrainingJob) -> list[run.Config]:
    """Return the callback of a job that starts from another job's optimizer state; an empty list for other jobs."""
    if job.carried is None:
        return []
    plan = job.carried.plan and str(job.carried.plan)
    checkpoints = str(job.carried.checkpoints)
    return [run.Config(CarryOptimizerState, checkpoints=checkpoints, plan=plan, steps=job.first_step)]


class CarryOptimizerState(pl.Callback, IOMixin):
    """Fill the optimizer before a run's first step with the part of another run's last state that a plan keeps."""

    def __init__(self, checkpoints: str, plan: str | None, steps: int) -> None:
        """Store where the state comes from.

        Args:
            checkpoints: Checkpoint folder of the previous run.
            plan: The plan by which that run's weights became this run's initial weights; None if nothing was removed.
            steps: Updates that the state has seen, for AdamW's bias correction.
        """
        self.checkpoints = checkpoints
        self.plan = plan
        self.steps = steps

    def on_train_start(self, trainer, pl_module):
        """Load the state, unless the run resumes from its own checkpoint, which includes optimizer state."""
        if trainer.global_step:
            return
        checkpoint = state_to_carry(Path(self.checkpoints))
        load_optimizer_state(
            [optimizer.mcore_optimizer for optimizer in trainer.strategy.optimizers],
            gpt_models(trainer.strategy.megatron_parallel),
            slice_optimizer_state(checkpoint, self.plan and Plan.load(Path(self.plan))),
            self.steps,
        )
        if trainer.is_global_zero:
            print(f"optimizer state of {checkpoint.name} after {self.steps} steps is carried over", flush=True)


def load_optimizer_state(
    optimizers: Iterable[MegatronOptimizer],
    models: Iterable[GPTModel],
    states: Mapping[str, WeightSource],
    steps: int,
) -> None:
    """Load the part of unsharded states that a rank updates into its optimizers, in any layout.

    Args:
        optimizers: Megatron's optimizers, chained or not, before their first step.
        models: The model chunks of this rank.
        states: For each of Megatron's names of a state, its tensors under the names of the model's weights.
        steps: Updates that the states have seen.

    Raises:
        UserError: an optimizer hides its weights, or a weight is not in the weight table.
    """
    first = states[MOMENTS[0]]
    shape = shape_of(first)
    layout = Layout.for_config(first.config)
    entries = {parameter: entry for _, parameter, entry in parameter_entries(models, layout, shape)}
    masters = next((states[name] for name in MASTERS if name in states), None)
    for optimizer in unchained(optimizers):
        refuse_unfit(optimizer, dict.fromkeys(entries), refusal="The optimizer's state cannot be carried over")
        inner = optimizer.optimizer
        for parameter, main, start in owned(optimizer):
            entry, local_range = entries[parameter], slice(start, start + main.numel())
            for name in MOMENTS:
                moment = _of_rank(states[name], entry, parameter).flatten()[local_range].view_as(main)
                inner.state[main][name] = moment.to(main.device, torch.float32)
            if masters is not None and main is not parameter:
                main.data.copy_(_of_rank(masters, entry, parameter).flatten()[local_range].view_as(main))
        for group in inner.param_groups:
            group["step"] = steps


def _of_rank(source: WeightSource, entry: Entry, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return this tensor parallel rank's slice of a Megatron tensor; the state of vocabulary padding is 0."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    parts = [source.read(part.name) for part in entry.parts]
    if entry.parts[0].axes[0] == "vocab":
        padding = len(parameter) * ranks - len(parts[0])
        parts = [torch.cat([parts[0], parts[0].new_zeros(padding, *parts[0].shape[1:])])] if padding else parts
    rank = parallel_state.get_tensor_model_parallel_rank()
    return entry.join_rank(parts, shape_of(source), rank, ranks)
