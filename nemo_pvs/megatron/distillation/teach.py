"""Write a teacher cache as one rank: the teacher's forward pass on Megatron, at any TP x PP x DP.

Every replica writes its own shards, and needs no other. Within a replica the first tensor rank of the last pipeline
stage writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.sample_index import training_samples
from nemo_pvs.data.teacher_cache import Answers
from nemo_pvs.megatron.distillation.teacher import Teacher
from nemo_pvs.megatron.distillation.top_k import top_k_answers
from nemo_pvs.megatron.inference import megatron_ranks
from nemo_pvs.system.ranks import barrier, from_main, joined
from nemo_pvs.training.machine import Machine
from nemo_pvs.training.metrics import time_left
from nemo_pvs.training.teaching_job import TeachingJob

_MICRO_BATCHES_AHEAD = 16
"""Micro-batches in a pipeline at a time, whose final hidden states the last pipeline stage keeps."""
_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}


def teach(job: TeachingJob) -> None:
    """Write the shards that are missing as one rank, which environment variables identify."""
    layout, content = job.layout, job.content
    with joined(on_gpus=True), megatron_ranks(layout.tensor_parallel, layout.pipeline_parallel):
        device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        dtype = _DTYPES[Machine.here().precision(job.precision)]
        teacher = Teacher(open_source(job.teacher), dtype=dtype, device=device, sequence_parallel=False)
        samples = training_samples(
            job.text, job.index, sequence_length=content.sequence_length, seed=content.seed, samples=content.end
        )
        missing = from_main(job.cache.missing)
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        progress = _Progress(job)
        for shard in missing[replica::replicas]:
            answers = _answers(teacher, samples, content.shard_samples(shard), job)
            if answers and parallel_state.get_tensor_model_parallel_rank() == 0:
                job.cache.write(shard, answers)
                progress.say(replica)
        barrier()


def _answers(teacher: Teacher, samples: Any, numbers: range, job: TeachingJob) -> list[Answers]:
    """Return the answers to samples, given by their numbers, on the last pipeline stage; on others an empty list."""
    answers = []
    for batches in _reads(numbers, job.micro_batch_size):
        teacher.read(
            [torch.stack([samples[number]["tokens"] for number in batch]) for batch in batches],
            teacher.inputs,
            sequence_length=job.content.sequence_length,
            micro_batch_size=len(batches[0]),
        )
        if parallel_state.is_pipeline_last_stage():
            for _ in batches:
                answers += _of_samples(teacher, job)
    return answers


def _reads(numbers: range, micro_batch: int) -> Iterator[list[range]]:
    """Yield micro-batches that go through the pipeline together: of equal size, the last of a shard may be smaller."""
    whole = len(numbers) // micro_batch
    batches = [numbers[index * micro_batch : (index + 1) * micro_batch] for index in range(whole)]
    for begin in range(0, whole, _MICRO_BATCHES_AHEAD):
        yield batches[begin : begin + _MICRO_BATCHES_AHEAD]
    if remaining := numbers[whole * micro_batch :]:
        yield [remaining]


def _of_samples(teacher: Teacher, job: TeachingJob) -> list[Answers]:
    """Return the answers to the samples of the teacher's next micro-batch, as they are stored."""
    group = parallel_state.get_tensor_model_parallel_group()
    tensors = top_k_answers(
        teacher.logits(),
        job.content.top_k,
        vocab=job.content.vocab,
        group=group if group.size() > 1 else None,
    )
    # [s, b, ...] on the device; log-probabilities are rounded when they are written.
    ids, logprobs, rest = (np.asarray(tensor.transpose(0, 1).cpu()) for tensor in tensors)
    return [Answers(*sample) for sample in zip(ids, logprobs, rest, strict=True)]


class _Progress:
    """Says in the log how far all replicas are, how fast, and how long the rest takes."""

    def __init__(self, job: TeachingJob) -> None:
        self._job = job
        self._began, self._before = time.monotonic(), job.cache.tokens_done

    def say(self, replica: int) -> None:
        if replica:
            return
        done, total = self._job.cache.tokens_done, self._job.content.tokens
        speed = (done - self._before) / (time.monotonic() - self._began)
        left = time_left(total - done, [speed])
        print(f"tokens {done:,}/{total:,}  {speed:,.0f} tokens/s  {left} left", flush=True)
