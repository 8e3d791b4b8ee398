"""The data module for training: Megatron's order of the samples, starting at a given sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron.core import parallel_state
from nemo.collections import llm
from torch.utils.data import Subset

from nemo_pvs.data.sample_index import build_datasets
from nemo_pvs.data.teacher_cache import TeacherCache
from nemo_pvs.errors import UserError
from nemo_pvs.megatron.distillation.answers import AnsweredSamples
from nemo_pvs.training.job import TrainingJob


def text_of(job: TrainingJob) -> dict[str, object]:
    """Return the arguments of ``PretrainingData`` that describe the text of ``job``."""
    train, validation = job.data["train"], [job.data["validation"]]
    distill = job.training.distill
    answers = {"cache": str(job.cache), "top_k": distill.kept} if job.cache and distill else {}
    return {
        **answers,
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

    def __init__(
        self, *args, first_sample: int = 0, cache: str | None = None, top_k: int | None = None, **kwargs
    ) -> None:
        """Store where to start, and where a teacher's answers are.

        Args:
            *args: Arguments of NeMo's module.
            first_sample: Number of the first sample.
            cache: Folder of a teacher cache; every training sample then comes with its answers.
            top_k: How many of the cached tokens count.
            **kwargs: Arguments of NeMo's module.
        """
        super().__init__(*args, **kwargs)
        self.create_attention_mask = False
        self.first_sample = first_sample
        self.cache = cache
        self.top_k = top_k

    def build(self, trainer_max_steps: int, *args, **kwargs) -> None:
        """Build the datasets; the training set includes the samples before the first one, which are then skipped.

        Their index is there already if the job was prepared on this file system (``nemo_pvs.data.sample_index``).

        Raises:
            UserError: the data end before the run does, or the teacher cache does not have the run's samples.
        """
        samples = self.first_sample + trainer_max_steps * self.data_sampler.global_batch_size
        built = build_datasets(self.dataset_cls, self.gpt_dataset_config, samples)
        self._train_ds, self._validation_ds, self._test_ds = built
        self._refuse_repetition(samples)
        if self.first_sample:
            self._train_ds = Subset(self._train_ds, range(self.first_sample, len(self._train_ds)))
        if self.cache:
            cache = TeacherCache.open(Path(self.cache))
            order = {"seed": self.seed, "sequence_length": self.seq_length, "top_k": self.top_k}
            cache.check_serves(replace(cache.content, **order, first=self.first_sample, end=samples))
            if parallel_state.is_pipeline_last_stage():
                self._train_ds = AnsweredSamples(self._train_ds, cache, self.first_sample, self.top_k)

    def _refuse_repetition(self, samples: int) -> None:
        """Raise UserError if a training file would be read more than once, which Megatron does silently in a blend."""
        for dataset in getattr(self._train_ds, "datasets", [self._train_ds]):
            available = int(dataset.dataset.sequence_lengths[dataset.indices].sum())
            if len(dataset) * self.seq_length >= available or samples > len(self._train_ds):
                raise UserError(
                    f"Training reads {samples * self.seq_length:,} tokens from the start of the data, but "
                    f"{dataset.dataset.path_prefix} has {available:,}; add text or train on fewer tokens."
                )
