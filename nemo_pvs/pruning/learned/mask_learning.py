"""Learn masks towards a target shape together with the weights: the part of Sheared LLaMA that needs no model.

The gradient of the loss with respect to the gates comes from the caller, the same on every rank; so every rank learns
the same masks, in fp32 whatever the model's dtype, and nothing is sharded. Xia et al., arXiv 2310.06694.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.learned.gates import UNITS, Gates, gate_sizes
from nemo_pvs.pruning.learned.hard_concrete import (
    LOG_ALPHA_RANGE,
    LOG_ALPHA_START,
    SMALLEST,
    deterministic,
    lagrangian,
    sample,
    zero_probability,
)

NAMES = {"hidden": "hidden channels", "groups": "KV groups", "ffn": "FFN channels", "layers": "layers"}
_SPREAD = 0.01
"""Standard deviation of log alpha at the start."""


@dataclass(frozen=True)
class MaskSettings:
    """Hyperparameters of mask learning; the defaults are those of the paper's run of 3,200 steps."""

    learning_rate: float = 1.0
    """Learning rate of log alpha at the peak of the weights' schedule."""
    multiplier_learning_rate: float = 1.0
    """Learning rate of the Lagrange multipliers, by gradient ascent."""
    target_warmup_steps: int = 640
    """Steps over which the target sparsity grows linearly from 0."""
    seed: int = 0


class MaskLearner:
    """Log alpha of every unit that may be removed, the Lagrange multipliers for the target shape, and their AdamW.

    Kinds of units that the target keeps entirely have constant gates of one.
    """

    def __init__(
        self, parent: Shape, target: Shape, settings: MaskSettings, device: torch.device | str = "cpu"
    ) -> None:
        """Start with masks that keep nearly everything.

        Raises:
            UserError: a shape is uneven, or the target is not smaller than the parent.
        """
        if parent.uneven or target.uneven:
            raise UserError("Masks are learned for models with even layers, towards a shape with even layers.")
        self.parent, self.target, self.settings = parent, target, settings
        self._device = torch.device(device)
        kept, sizes = kept_units(target), gate_sizes(parent)
        larger = [NAMES[unit] for unit in UNITS if kept[unit] > sizes[unit][-1]]
        if larger:
            raise UserError(f"The target [{target}] has more {larger[0]} than its parent [{parent}].")
        generator = torch.Generator().manual_seed(settings.seed)
        self.log_alpha: dict[str, torch.Tensor] = {}
        for unit in UNITS:
            if kept[unit] < sizes[unit][-1]:
                start = torch.randn(sizes[unit], generator=generator) * _SPREAD + LOG_ALPHA_START
                self.log_alpha[unit] = start.clamp(*LOG_ALPHA_RANGE).to(device).requires_grad_()
        if not self.log_alpha:
            raise UserError(f"The target [{target}] is as large as its parent; there is nothing to learn.")
        self.multipliers = {unit: torch.zeros(2, device=device, requires_grad=True) for unit in self.log_alpha}
        self.targets = {unit: 1 - kept[unit] / sizes[unit][-1] for unit in self.log_alpha}
        self._kept = kept
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [*self.log_alpha.values()], "lr": settings.learning_rate},
                {"params": [*self.multipliers.values()], "lr": settings.multiplier_learning_rate, "maximize": True},
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.0,
        )
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]

    def draw(self, step: int) -> Gates:
        """Sample the gates of a step, counted from 0; depends only on the seed, the step and log alpha."""
        with torch.no_grad():
            return self._gates(self._sample(step))

    def _sample(self, step: int) -> dict[str, torch.Tensor]:
        noise = np.random.default_rng([self.settings.seed, step])
        drawn = {}
        for unit, log_alpha in self.log_alpha.items():
            uniform = noise.random(log_alpha.shape, dtype=np.float32).clip(SMALLEST, 1 - SMALLEST)
            drawn[unit] = sample(log_alpha, torch.from_numpy(uniform).to(self._device))
        return drawn

    @torch.no_grad()
    def deterministic(self) -> Gates:
        """Return gates without noise that keep exactly the target shape."""
        return self._gates({unit: deterministic(alpha, self._kept[unit]) for unit, alpha in self.log_alpha.items()})

    def _gates(self, learned: Mapping[str, torch.Tensor]) -> Gates:
        sizes = gate_sizes(self.parent)
        return Gates(**{u: learned[u] if u in learned else torch.ones(sizes[u], device=self._device) for u in UNITS})

    def learn(self, step: int, gradients: Gates, schedule: float = 1.0) -> None:
        """Take an optimizer step: descent on loss plus Lagrangian in the masks, ascent in the multipliers.

        Args:
            step: The step whose gates were drawn.
            gradients: Gradient of the loss with respect to those gates.
            schedule: The weights' learning rate as a share of its peak.
        """
        by_unit = dict(zip(UNITS, gradients.tensors, strict=True))
        total = torch.zeros((), device=self._device)
        for unit, gates in self._sample(step).items():
            total = total + (gates * by_unit[unit]).sum() + self._penalty(unit, step)
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * schedule
        self._optimizer.step()
        with torch.no_grad():
            for log_alpha in self.log_alpha.values():
                log_alpha.clamp_(*LOG_ALPHA_RANGE)

    def _penalty(self, unit: str, step: int) -> torch.Tensor:
        warmed = min(1.0, step / self.settings.target_warmup_steps) if self.settings.target_warmup_steps else 1.0
        sparsity = zero_probability(self.log_alpha[unit]).mean(dim=-1)
        return lagrangian(sparsity, self.targets[unit] * warmed, self.multipliers[unit])

    @torch.no_grad()
    def sparsities(self) -> dict[str, float]:
        """Return the expected sparsity of each kind of unit."""
        return {unit: float(zero_probability(alpha).mean()) for unit, alpha in self.log_alpha.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all that an interrupted run needs to resume."""
        tensors = {f"log_alpha.{unit}": alpha.detach().cpu() for unit, alpha in self.log_alpha.items()}
        tensors |= {f"multipliers.{unit}": pair.detach().cpu() for unit, pair in self.multipliers.items()}
        return {"tensors": tensors, "optimizer": on_cpu(self._optimizer.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, for the same parent and target."""
        with torch.no_grad():
            for unit in self.log_alpha:
                self.log_alpha[unit].copy_(state["tensors"][f"log_alpha.{unit}"])
                self.multipliers[unit].copy_(state["tensors"][f"multipliers.{unit}"])
        self._optimizer.load_state_dict(dict(state["optimizer"]))


def on_cpu(state: Any) -> Any:
    """Return a copy of nested state with its tensors on the CPU.

    Ranks send each other, pickled, the state that they have in common, and all would restore a tensor of GPU 0 there.
    """
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone().cpu(), state)


def kept_units(target: Shape) -> dict[str, int]:
    """Return how many units of each row of gates the target keeps."""
    return {"hidden": target.hidden, "groups": target.kv_groups, "ffn": target.ffn, "layers": target.layers}
