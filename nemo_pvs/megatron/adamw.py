"""AdamW with the state that Megatron's optimizers expect: moments per weight, one step count per parameter group.

That is the interface of Apex's and Transformer Engine's FusedAdam. PyTorch's own AdamW keeps a step count per weight,
which Megatron's distributed optimizer can neither save nor restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter, 1711.05101), computed by PyTorch's fused kernel.

    Args:
        params: parameters or parameter groups, floating-point.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decay per unit of learning rate.
        adam_w_mode: must be true; Megatron passes it to every FusedAdam.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("GroupStepAdamW decouples weight decay; set decoupled_weight_decay=True.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every weight that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight] = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            if not weights:
                continue
            states = [self.state[weight] for weight in weights]
            # The kernel increments the step itself, in one tensor per weight; these tensors are then discarded.
            before = torch.full((), group["step"] - 1, dtype=torch.float32, device=weights[0].device)
            adamw(
                weights,
                [weight.grad for weight in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [before.clone() for _ in weights],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss


def stand_in_for_fused_adam() -> None:
    """Have Megatron use ``GroupStepAdamW`` from now on, unless there is a FusedAdam, of Apex or Transformer Engine.

    It is presented as Apex's, which has the same interface. These FusedAdams run on GPUs only.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE and torch.cuda.is_available():
        return
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
