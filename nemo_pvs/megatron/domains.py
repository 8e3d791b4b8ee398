"""Dynamic batch loading in NeMo's training loop: batches of several domains, whose shares follow their losses.

Validation reads the same number of windows of each domain, in whole global batches. So every validation step measures
one domain, and no extra pass over any text is needed. What a step reads depends on earlier losses; so nothing may be
prefetched, and no worker process loads data.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import nemo_run as run
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from nemo.lightning.io import IOMixin
from torch.utils.data import ConcatDataset, Dataset

from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.domain_order import DomainOrder
from nemo_pvs.data.dynamic_loading import update_proportions
from nemo_pvs.errors import UserError
from nemo_pvs.megatron.data import PretrainingData
from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob


class DomainData(PretrainingData):
    """NeMo's data module for text in domains; each has its own seeded order and is never read twice.

    The shares and the position in each domain are saved with every checkpoint.
    """

    def __init__(self, domains: dict, shares: dict, samples: dict, **kwargs):
        """Store the domains and where to start.

        Args:
            domains: Prefixes of the training and validation files, by domain.
            shares: Initial share of each domain in a batch.
            samples: Number of samples of each domain that were read before this run.
            **kwargs: Arguments of ``PretrainingData``.
        """
        super().__init__(**kwargs)
        self.domains = domains
        self.shares = shares
        self.samples = samples

    def build(self, trainer_max_steps: int, *args, **kwargs) -> None:
        """Build one epoch of every domain.

        Raises:
            UserError: the run starts from shares that are not known yet.
        """
        if not self.shares:
            raise UserError(
                "This run starts from the domain shares at the end of mask learning, which has not run yet; start it "
                "with pvs run, or set train.dynamic_loading.proportions."
            )
        train, validation = zip(*(self._datasets(*prefixes) for prefixes in self.domains.values()), strict=True)
        sizes = {name: len(dataset) for name, dataset in zip(self.domains, train, strict=True)}
        batch = self.data_sampler.global_batch_size
        self.order = DomainOrder(sizes, self.shares, self.samples, batch=batch, seed=self.seed)
        self._train_ds = _Mixture(train, self.order, trainer_max_steps * batch)
        self._validation_ds = self._test_ds = ConcatDataset(validation)

    def _datasets(self, train, validation):
        files = [([train], None), ([validation], None), None]
        config = replace(self.gpt_dataset_config, blend_per_split=files)
        train_validation_test = BlendedMegatronDatasetBuilder(
            self.dataset_cls, [None] * 3, lambda: True, config
        ).build()
        return train_validation_test[:2]

    def state_dict(self):
        """Return the state to checkpoint: NeMo's, and the shares and positions of the domains."""
        return {**super().state_dict(), "domains": self.order.state(self.trainer.global_step)}

    def load_state_dict(self, state_dict):
        """Continue from the position in a checkpoint."""
        super().load_state_dict(state_dict)
        self.order.restore(state_dict["domains"])


class _Mixture(Dataset):
    """The samples of a training run, whose domains are decided when they are read."""

    def __init__(self, datasets, order, length):
        self.datasets = datasets
        self.order = order
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        domain, position = self.order.sample(int(index))
        return self.datasets[domain][position]


def domains_of(job: TrainingJob) -> dict[str, object]:
    """Return the arguments of ``DomainData`` that describe the text of ``job``."""
    train, validation = job.data["train"], job.data["validation"]
    windows = list(validation.values())
    return {
        "paths": {"train": list(train.values()), "validation": windows, "test": windows},  # NeMo requires all three
        "domains": {name: [train[name], validation[name]] for name in train},
        "shares": job.loading.shares,
        "samples": job.loading.samples,
    }


def follow_losses(job: TrainingJob) -> list[run.Config]:
    """Return the callback of a run with dynamic batch loading; an empty list for other runs."""
    how = job.training.dynamic_loading
    if job.loading is None or how is None:
        return []
    size = job.masks.target.parameters if job.masks else job.pruning.parameters if job.pruning else None
    return [
        run.Config(
            FollowLosses, how=how.model_dump(), initial=str(job.initial), path=str(job.metrics), parameters=size
        )
    ]


class FollowLosses(pl.Callback, IOMixin):
    """Record the loss of every domain at each validation, and update the domains' shares from it."""

    def __init__(self, how: dict, initial: str, path: str, parameters: float | None = None) -> None:
        """Store the options.

        Args:
            how: The recipe's block ``dynamic_loading``.
            initial: Checkpoint of the model.
            path: Metrics file.
            parameters: Model size to which target losses are extrapolated; by default that of ``initial``.
        """
        self.how = DynamicLoading.model_validate(how)
        self.initial = initial
        self.path = Path(path)
        self.parameters = parameters
        self._losses: list[torch.Tensor] = []

    def on_train_start(self, trainer, pl_module):
        """Compute the target losses, and validate on resuming if the checkpoint was written just before a validation.

        NeMo skips that validation in a resumed run, and Lightning would read only part of the windows.
        """
        trainer.fit_loop.epoch_loop.skip_val_on_restart = False
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        parameters = self.parameters or shape_of(NemoSource(self.initial)).parameters
        self._targets = self.how.targets(trainer.datamodule.order.names, parameters)

    def on_validation_start(self, trainer, pl_module):
        """Discard the losses of the last validation."""
        self._losses = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *args, **kwargs):
        """Keep the loss of one global batch of windows, all from the same domain."""
        self._losses.append(outputs.detach())

    def on_validation_end(self, trainer, pl_module):
        """Update the shares, to the same values on every rank."""
        order, step = trainer.datamodule.order, trainer.global_step
        measured = torch.stack(self._losses).float().view(len(order.names), -1).mean(1)
        # Pipeline stages other than the last have zeros; and ranks must not differ even in the last bit.
        torch.distributed.all_reduce(measured, op=torch.distributed.ReduceOp.MAX)
        losses, shares = measured.tolist(), list(order.shares.values())
        if self._targets is not None:
            options = {"rate": self.how.rate, "smoothing": self.how.smoothing, "clip": self.how.clip}
            shares = update_proportions(shares, losses, self._targets, **options)
        order.change(step, dict(zip(order.names, shares, strict=True)))
        if trainer.is_global_zero:
            by_name = dict(zip(order.names, losses, strict=True))
            record = {
                "kind": "domains",
                "step": step,
                "losses": by_name,
                "shares": order.shares,
                "samples": order.taken,
            }
            metrics.append(self.path, record)
            words = ", ".join(f"{name} {share:.4f} (loss {by_name[name]:.4f})" for name, share in order.shares.items())
            print(f"step {step}/{trainer.max_steps}  shares from here on: {words}", flush=True)
