"""Learning-rate schedules and a weight-decay option that NeMo lacks, as parts of a NeMo recipe."""

from __future__ import annotations

from functools import partial

from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from nemo_pvs.training.learning_rate import linear_warmup, quadratic_warmup_cosine


class QuadraticWarmupCosine(LRSchedulerModule):
    """``learning_rate.quadratic_warmup_cosine`` as a NeMo scheduler, stepped once per optimizer step."""

    def __init__(self, max_steps: int, warmup_steps: int, min_ratio: float) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.warmup_steps = warmup_steps
        self.min_ratio = min_ratio

    def scheduler(self, model, optimizer):
        """Return the optimizer and its scheduler in Lightning's format."""
        share = partial(
            quadratic_warmup_cosine, steps=self.max_steps, warmup_steps=self.warmup_steps, min_ratio=self.min_ratio
        )
        return _stepped(optimizer, share)


class PartOfSchedule(LRSchedulerModule):
    """Part of a schedule of ``nemo_pvs.training.learning_rate``, starting at ``first_step`` of the whole schedule.

    NeMo overwrites any scheduler attribute named ``max_steps`` with the run's own steps; so this class has none.
    """

    def __init__(
        self,
        warmup: str,
        first_step: int,
        all_steps: int,
        warmup_steps: int,
        min_ratio: float,
        decay_steps: int | None,
    ) -> None:
        super().__init__()
        self.warmup = warmup
        self.first_step = first_step
        self.all_steps = all_steps
        self.warmup_steps = warmup_steps
        self.min_ratio = min_ratio
        self.decay_steps = decay_steps

    def scheduler(self, model, optimizer):
        """Return the optimizer and its scheduler in Lightning's format."""
        numbers = {"steps": self.all_steps, "warmup_steps": self.warmup_steps, "min_ratio": self.min_ratio}
        whole = (
            partial(quadratic_warmup_cosine, **numbers)
            if self.warmup == "quadratic"
            else partial(linear_warmup, **numbers, decay_steps=self.decay_steps)
        )
        return _stepped(optimizer, lambda step: whole(self.first_step + step))


def _stepped(optimizer, share):
    """Return a schedule that advances once per optimizer step, in Lightning's format."""
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step", "frequency": 1},
        "monitor": "val_loss",
    }


def decays_everything(name, parameter) -> bool:
    """Return False for every parameter: Megatron exempts none from weight decay, not even norms and biases."""
    return False
