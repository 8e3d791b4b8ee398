"""Run one rank of a training job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fiddle
import torch
from nemo.collections import llm

from nemo_pvs.megatron.cpu import megatron_on_cpu
from nemo_pvs.megatron.distillation.teach import teach
from nemo_pvs.megatron.pretrain import pretrain_recipe
from nemo_pvs.training.teaching_job import Job, TeachingJob


def train(job: Job) -> None:
    """Start or resume a job as one rank, which environment variables identify."""
    if not torch.cuda.is_available():
        train_on_cpu(job)
    elif isinstance(job, TeachingJob):
        teach(job)
    else:
        fiddle.build(pretrain_recipe(job))()


def pretrain_on_cpu(
    model: Any, data: Any, trainer: Any, log: Any = None, resume: Any = None, optim: Any = None
) -> Path:
    """Run NeMo's ``llm.pretrain`` on a machine without CUDA, with objects that NeMo-Run has built."""
    with megatron_on_cpu():
        return llm.pretrain(model=model, data=data, trainer=trainer, log=log, resume=resume, optim=optim)


def train_on_cpu(job: Job) -> None:
    """Run one rank of a job on this machine's CPU, with an equal share of its cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // job.layout.processes))
    if isinstance(job, TeachingJob):
        teach(job)
        return
    with megatron_on_cpu():
        fiddle.build(pretrain_recipe(job))()
