"""The data module for training: Megatron's order of the samples, starting at a given sample."""

from __future__ import annotations

from nemo.collections import llm
from torch.utils.data import Subset

from nemo_pvs.data.sample_index import build_datasets
from nemo_pvs.errors import UserError
from nemo_pvs.training.job import TrainingJob


def text_of(job: TrainingJob) -> dict[str, object]:
    """Return the arguments of ``PretrainingData`` that describe the text of ``job``."""
    train, validation = job.data["train"], [job.data["validation"]]
    return {
        "paths": {
            "train": [train] if isinstance(train, str) else train,
            "validation": validation,
            "test": validation,  # NeMo requires all three; this one is never read
        },
        "first_sample": job.first_token // job.training.sequence_length,
    }


class PretrainingData(llm.PreTrainingDataModule):
    """NeMo's data module, which can start at any sample of the training order and refuses to read text twice.

    Megatron shuffles the whole data set by the seed alone: sample i is the same for every budget, model and layout. A
    run reads samples from ``first_sample`` on, so runs with adjacent ranges share no sample, and arms with the same
    range read the same samples in the same order.

    No attention masks are built, as NeMo would do without Transformer Engine: every layer that we train applies the
    causal mask itself, so a mask per sample would be wasted work.
    """

    def __init__(self, *args, first_sample: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.create_attention_mask = False
        self.first_sample = first_sample

    def build(self, trainer_max_steps: int, *args, **kwargs) -> None:
        """Build the datasets; the training set includes the samples before the first one, which are then skipped.

        Their index is there already if the job was prepared on this file system (``nemo_pvs.data.sample_index``).

        Raises:
            UserError: the data end before the run does.
        """
        samples = self.first_sample + trainer_max_steps * self.data_sampler.global_batch_size
        built = build_datasets(self.dataset_cls, self.gpt_dataset_config, samples)
        self._train_ds, self._validation_ds, self._test_ds = built
        self._refuse_repetition(samples)
        if self.first_sample:
            self._train_ds = Subset(self._train_ds, range(self.first_sample, len(self._train_ds)))

    def _refuse_repetition(self, samples: int) -> None:
        """Raise UserError if a training file would be read more than once, which Megatron does silently in a blend."""
        for dataset in getattr(self._train_ds, "datasets", [self._train_ds]):
            available = int(dataset.dataset.sequence_lengths[dataset.indices].sum())
            if len(dataset) * self.seq_length >= available or samples > len(self._train_ds):
                raise UserError(
                    f"Training reads {samples * self.seq_length:,} tokens from the start of the data, but "
                    f"{dataset.dataset.path_prefix} has {available:,}; add text or train on fewer tokens."
                )
