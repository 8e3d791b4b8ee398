"""The data module of training: Megatron's order of the tokens, from a given place in it on."""

from __future__ import annotations

from nemo.collections import llm
from torch.utils.data import Subset

from nemo_pvs.errors import UserError
from nemo_pvs.training.job import TrainingJob


def text_of(job: TrainingJob) -> dict[str, object]:
    """Return what ``PretrainingData`` needs to know of the text of ``job``."""
    train, validation = job.data["train"], [job.data["validation"]]
    return {
        "paths": {
            "train": [train] if isinstance(train, str) else train,
            "validation": validation,
            "test": validation,  # NeMo wants all three; nothing reads this one
        },
        "first_sample": job.first_token // job.training.sequence_length,
    }


class PretrainingData(llm.PreTrainingDataModule):
    """NeMo's data module, which begins at a place in the order of training, and refuses to begin it anew.

    Megatron shuffles the whole data by the seed alone: sample i is the same for every budget, model and layout. A run
    reads samples from ``first_sample`` on, so runs with neighbouring ranges share no sample, and arms with the same
    range read the same samples in the same order.

    No attention masks are built, as NeMo does where Transformer Engine is missing: the attention is causal by itself
    in every layer that we train, so a mask per sample is work for nothing.
    """

    def __init__(self, *args, first_sample: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.create_attention_mask = False
        self.first_sample = first_sample

    def build(self, trainer_max_steps: int, *args, **kwargs) -> None:
        """Build the datasets, the training data long enough for what lies before the first sample too.

        Raises:
            UserError: the data end before the run does.
        """
        wanted = self.first_sample + trainer_max_steps * self.data_sampler.global_batch_size
        self.num_train_samples = wanted
        super().build(trainer_max_steps, *args, **kwargs)
        self._refuse_repetition(wanted)
        if self.first_sample:
            self._train_ds = Subset(self._train_ds, range(self.first_sample, len(self._train_ds)))

    def _refuse_repetition(self, wanted: int) -> None:
        """Raise UserError if a training file is read more than once, which Megatron does without a word."""
        for dataset in getattr(self._train_ds, "datasets", [self._train_ds]):
            available = int(dataset.dataset.sequence_lengths[dataset.indices].sum())
            if len(dataset) * self.seq_length >= available:
                raise UserError(
                    f"Training reads {wanted * self.seq_length:,} tokens from the start of the data, but "
                    f"{dataset.dataset.path_prefix} has {available:,}; take more text or train on fewer tokens."
                )
