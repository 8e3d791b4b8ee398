"""Train over gloo with what a machine with GPUs is set up for: everything but the devices and NCCL.

That is checkpoints that are saved asynchronously, written and read in parallel; gradients that are reduced, and
weights that are gathered, while others are computed, in several buckets; and worker processes that read the data.
"""

from __future__ import annotations

import copy
import multiprocessing
from dataclasses import replace
from typing import Any

import torch

from nemo_pvs.training.job import TrainingJob

BUCKET = 20_000
"""Gradients that are reduced together: a few buckets of a tiny model."""


def recipe_of_gpus(job: TrainingJob) -> Any:
    """Return the pretraining that a machine with GPUs, but without Transformer Engine, would run, on CPUs."""
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

    from nemo_pvs.megatron.pretrain import pretrain_recipe
    from nemo_pvs.training.machine import Machine

    recipe = pretrain_recipe(job, replace(Machine.here(), gpu=True, transformer_engine=False))
    strategy, callbacks = recipe.trainer.strategy, recipe.trainer.callbacks
    assert strategy.ckpt_async_save
    assert strategy.ckpt_parallel_load
    assert strategy.ckpt_parallel_save
    assert strategy.ddp.overlap_grad_reduce == strategy.ddp.overlap_param_gather == job.layout.distributed_optimizer
    ddp = copy.copy(strategy.ddp)
    strategy.ddp.bucket_size = BUCKET
    recipe.trainer.accelerator = "cpu"
    recipe.data.pin_memory = False
    recipe.model.config.use_cpu_initialization = True
    # It asks CUDA for its version, and sets what is set already, as it is told.
    told = ("bucket_size", "overlap_grad_reduce", "overlap_param_gather")
    for one in callbacks:
        if one.__fn_or_cls__ is MegatronCommOverlapCallback:
            assert [getattr(one, name) for name in told] == [getattr(ddp, name) for name in told]
    recipe.trainer.callbacks = [one for one in callbacks if one.__fn_or_cls__ is not MegatronCommOverlapCallback]
    return recipe


def set_up_as_on_gpus() -> None:
    """Have this process train with the settings of GPUs from now on."""
    from megatron.core.dist_checkpointing import exchange_utils

    from nemo_pvs.megatron import cpu, rank

    class TorchOnHost(cpu._TorchOnHost):
        def empty_like(self, tensor: torch.Tensor, *, device: Any) -> torch.Tensor:
            return torch.empty_like(tensor)

    exchange_utils.torch = TorchOnHost()  # ranks send each other what they have read, from buffers on "cuda"
    multiprocessing.set_start_method("fork", force=True)  # Python's default, which run_ranks has changed
    rank.pretrain_recipe = recipe_of_gpus
