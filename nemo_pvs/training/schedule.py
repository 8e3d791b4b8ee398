"""The paper's learning-rate schedule and weight decay as parts of a NeMo recipe."""

from __future__ import annotations

from functools import partial

from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from nemo_pvs.learning_rate import quadratic_warmup_cosine


class QuadraticWarmupCosine(LRSchedulerModule):
    """``learning_rate.quadratic_warmup_cosine`` beside NeMo's own schedulers, stepped once an optimizer step."""

    def __init__(self, max_steps: int, warmup_steps: int, min_ratio: float) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.warmup_steps = warmup_steps
        self.min_ratio = min_ratio

    def scheduler(self, model, optimizer):
        """Return what Lightning asks for."""
        share = partial(
            quadratic_warmup_cosine, steps=self.max_steps, warmup_steps=self.warmup_steps, min_ratio=self.min_ratio
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step", "frequency": 1},
            "monitor": "val_loss",
        }


def decays_everything(name, parameter) -> bool:
    """Tell Megatron of no parameter that weight decay should spare it, norms and biases included."""
    return False
