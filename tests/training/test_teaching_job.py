"""The job that writes a teacher cache, without ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_pvs.data.teacher_cache import Answers, CacheContent
from nemo_pvs.errors import UserError
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.training.teaching_job import TeachingJob, load_job

CONTENT = CacheContent("t", "k", "d", seed=1, sequence_length=2, first=0, end=16, vocab=9, top_k=3)


def test_answers_of_two_precisions_are_not_mixed(tmp_path: Path) -> None:
    job = TeachingJob("teach", tmp_path, tmp_path, "text", tmp_path / "index", CONTENT, Parallelism(), 1, "bf16")
    job.save()
    job = replace(job, precision="fp32")
    assert load_job(job.save()) == job, "nothing was answered yet"
    answers = Answers(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2))
    job.cache.write(5, [answers] * len(CONTENT.shard_samples(5)))
    assert load_job(replace(job, layout=Parallelism(data_parallel=2)).save()) != job
    with pytest.raises(UserError, match="answers that the teacher computed in precision fp32, not auto"):
        replace(job, precision="auto").save()
