"""Masks towards a target shape, learned together with the weights: the part of Sheared LLaMA that needs no model.

The gradient of the loss by the gates comes from whatever runs the model, the same on every rank; so masks are learned
on every rank alike, in fp32 whatever the model's type, and need no sharding. Xia et al., arXiv 2310.06694.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

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
    """How masks are learned; defaults are those of the paper's run of 3,200 steps."""

    learning_rate: float = 1.0
    """Of log alpha, at the peak of the schedule of the weights."""
    multiplier_learning_rate: float = 1.0
    """Of the Lagrange multipliers, which go uphill."""
    target_warmup_steps: int = 640
    """Steps in which the target sparsity grows from 0."""
    seed: int = 0


class MaskLearner:
    """Log alpha of every unit that may go, the multipliers that hold them to the target shape, and their AdamW.

    Axes of which the target keeps everything have gates of one and nothing to learn.
    """

    def __init__(
        self, parent: Shape, target: Shape, settings: MaskSettings, device: torch.device | str = "cpu"
    ) -> None:
        """Start with masks that keep all but everything.

        Raises:
            UserError: the target is not a smaller even shape, or the same.
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
        """Return the random gates of a step, counted from 0: the same wherever and whenever it is taken."""
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
        """Return the gates of exactly the target shape."""
        return self._gates({unit: deterministic(one, self._kept[unit]) for unit, one in self.log_alpha.items()})

    def _gates(self, learned: Mapping[str, torch.Tensor]) -> Gates:
        sizes = gate_sizes(self.parent)
        return Gates(**{u: learned[u] if u in learned else torch.ones(sizes[u], device=self._device) for u in UNITS})

    def learn(self, step: int, gradients: Gates, schedule: float = 1.0) -> None:
        """Take a step: descent of the loss and the Lagrangian in the masks, ascent in the multipliers.

        Args:
            step: The step whose gates were drawn.
            gradients: Of the loss by those gates.
            schedule: The learning rate of the weights as a share of its peak.
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
        """Return the expected share of each kind of unit that is zero."""
        return {unit: float(zero_probability(one).mean()) for unit, one in self.log_alpha.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all that an interrupted run needs to go on."""
        tensors = {f"log_alpha.{unit}": one.detach().cpu() for unit, one in self.log_alpha.items()}
        tensors |= {f"multipliers.{unit}": one.detach().cpu() for unit, one in self.multipliers.items()}
        return {"tensors": tensors, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo ``state_dict``, for the same parent and target."""
        with torch.no_grad():
            for unit in self.log_alpha:
                self.log_alpha[unit].copy_(state["tensors"][f"log_alpha.{unit}"])
                self.multipliers[unit].copy_(state["tensors"][f"multipliers.{unit}"])
        self._optimizer.load_state_dict(dict(state["optimizer"]))


def kept_units(target: Shape) -> dict[str, int]:
    """Return how many units of a row of gates stay."""
    return {"hidden": target.hidden, "groups": target.kv_groups, "ffn": target.ffn, "layers": target.layers}
