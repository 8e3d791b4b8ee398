"""Training samples that come with the answers of a teacher cache, for the pipeline stage that computes the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from nemo_pvs.data.teacher_cache import Answers, TeacherCache

_IDS, _LOGPROBS, _REST = "teacher_ids", "teacher_logprobs", "teacher_rest"


class AnsweredSamples(Dataset[dict[str, torch.Tensor]]):
    """Megatron's samples, each with the answers that the cache has for its number in training order.

    Whatever reads samples (ranks, micro-batches, workers, a resumed run), the answers of each are read with it.
    """

    def __init__(self, samples: Any, cache: TeacherCache, first: int, top_k: int) -> None:
        """Join samples and answers.

        Args:
            samples: The samples of the run.
            cache: A cache that has answers to all of them.
            first: Number of the run's first sample.
            top_k: How many of the cached tokens count; the others are added to the rest.
        """
        self.samples = samples
        self.cache = cache
        self.first = first
        self.top_k = top_k

    def __len__(self) -> int:
        """Return the number of samples, including those without answers after the end of the cache."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample, and the teacher's ids [s, k], log-probabilities [s, k] and rest [s]."""
        answers = most_likely(self.cache.read(self.first + int(index)), self.top_k)
        return {
            **self.samples[index],
            _IDS: torch.from_numpy(answers.ids.astype(np.int32)),
            _LOGPROBS: torch.from_numpy(answers.logprobs),
            _REST: torch.from_numpy(answers.rest),
        }


def most_likely(answers: Answers, k: int) -> Answers:
    """Return the answers with k tokens; the probability of the other ones is added to the rest."""
    if answers.ids.shape[-1] <= k:
        return answers
    left_out = np.logaddexp.reduce(answers.logprobs[..., k:].astype(np.float32), axis=-1)
    rest = np.logaddexp(left_out, answers.rest.astype(np.float32))
    return Answers(answers.ids[..., :k], answers.logprobs[..., :k].copy(), rest)


def answers_in(
    items: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the answers in a micro-batch: ids [s, b, k], log-probabilities [s, b, k] and rest [s, b]."""
    ids, logprobs, rest = (
        items[name].to(device, non_blocking=True).transpose(0, 1) for name in (_IDS, _LOGPROBS, _REST)
    )
    return ids, logprobs, rest
