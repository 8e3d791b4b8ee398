"""Translate a TrainingJob to NeMo: one `run.Partial` of `llm.pretrain` for parent, pruned and scratch alike.

The architecture comes from the initial checkpoint, so it cannot differ from the weights; everything else comes from
the job. The same object trains on a CPU and on a cluster: without Transformer Engine, fused kernels are switched off
and attention is PyTorch's.
"""

from __future__ import annotations

import os

import fiddle
import nemo_run as run
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_with_fp8_current_scaling_mixed
from nemo.lightning import io
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

from nemo_pvs.checkpoints.masks import FILE as MASKS_FILE
from nemo_pvs.megatron.attention import FUSED_KERNELS, causal_data_step, layer_spec
from nemo_pvs.megatron.callbacks import CheckpointCallback, MetricsLog
from nemo_pvs.megatron.data import PretrainingData, text_of
from nemo_pvs.megatron.distillation.callback import distill
from nemo_pvs.megatron.domains import DomainData, domains_of, follow_losses
from nemo_pvs.megatron.masks.callback import CHECK_STEPS, HoldMasks
from nemo_pvs.megatron.preemption import Resume, SaveOnTimeOrSignal
from nemo_pvs.megatron.pruning.carried_state import carry_optimizer_state
from nemo_pvs.megatron.pruning.efficient_callback import prune_while_training
from nemo_pvs.megatron.pruning.gates import gated_layer_spec
from nemo_pvs.megatron.pruning.sheared import learn_masks
from nemo_pvs.megatron.schedule import PartOfSchedule, QuadraticWarmupCosine, decays_everything
from nemo_pvs.megatron.strategy import Strategy
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.system.files import sha256_json
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.machine import Machine


def pretrain_recipe(
    job: TrainingJob, machine: Machine | None = None, described: run.Config | None = None
) -> run.Partial:
    """Return NeMo's pretraining of ``job``, ready to be built and called on every rank.

    Args:
        job: The training job.
        machine: The machine to build for; by default this one.
        described: The model's configuration, if the job's initial checkpoint does not exist yet.

    Raises:
        UserError: the machine cannot run the job's layout or precision.
    """
    machine = machine or Machine.here()
    machine.check(job.layout)
    precision = machine.precision(job.training.precision)
    return run.Partial(
        llm.pretrain,
        model=model(job, precision, machine, described),
        data=data_module(job, machine),
        trainer=trainer(job, precision, machine),
        log=run.Config(
            nl.NeMoLogger,
            log_dir=str(job.folder),
            name="nemo",
            use_datetime_version=False,
            update_logger_directory=False,
            ckpt=checkpointing(job),
            tensorboard=run.Config(TensorBoardLogger, save_dir=str(job.folder), name="tensorboard", version=""),
            wandb=weights_and_biases(job),
        ),
        optim=optimizer(job, precision),
        resume=run.Config(
            Resume,
            resume_if_exists=True,
            resume_from_directory=str(job.checkpoints),
            resume_ignore_no_checkpoint=True,
            restore_config=run.Config(nl.RestoreConfig, path=str(job.initial)),
        ),
    )


def model(job: TrainingJob, precision: str, machine: Machine, described: run.Config | None = None) -> run.Config:
    """Return the model of the initial checkpoint, configured for the kernels that the machine has."""
    stored = described or io.load_context(job.initial / "context", subpath="model", build=False)
    config = fiddle.cast(run.Config, stored.config)
    config.seq_length = job.training.sequence_length
    config.params_dtype = config.pipeline_dtype = _DTYPES[precision]
    config.bf16, config.fp16 = precision != "fp32", False
    if not machine.transformer_engine:
        for kernel in FUSED_KERNELS:
            setattr(config, kernel, False)
        config.transformer_layer_spec = layer_spec
        config.data_step_fn = causal_data_step
        # Initialisation must not need a CUDA generator; the restored weights overwrite it in any case.
        config.use_cpu_initialization = not machine.gpu
    elif job.teacher is None:
        # No fp32 copy of the logits. It puts the gradient in their place, so a teacher's loss could not read them.
        config.cross_entropy_fusion_impl = "te"
    if job.masks or job.pruning:
        config.transformer_layer_spec = gated_layer_spec
    if job.layout.recompute == "selective":
        config.recompute_granularity, config.recompute_modules = "selective", ["mlp"]
    elif job.layout.recompute == "full":
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    if job.layout.virtual_pipeline:
        # Of two pipeline stages each comes before and after the other: batched messages would be mixed up.
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        # gloo still reads a sent tensor after Megatron would have freed it.
        config.deallocate_pipeline_outputs = machine.gpu
    return run.Config(fiddle.get_callable(stored), config=config)


def data_module(job: TrainingJob, machine: Machine) -> run.Config:
    """Return the data module: the job's tokens in an order that depends only on the seed."""
    training = job.training
    module, text = (DomainData, domains_of(job)) if job.loading else (PretrainingData, text_of(job))
    return run.Config(
        module,
        **text,
        split=None,
        tokenizer=run.Config(AutoTokenizer, pretrained_model_name=str(job.initial / "context" / "tokenizer")),
        seq_length=training.sequence_length,
        micro_batch_size=job.layout.micro_batch_size or training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        seed=training.order_seed,
        num_workers=4 if machine.gpu and not job.loading else 0,
        pin_memory=machine.gpu,
        index_mapping_dir=str(job.index),
    )


def trainer(job: TrainingJob, precision: str, machine: Machine) -> run.Config:
    """Return the trainer: Megatron's strategy in the job's layout, with validation at equal intervals."""
    layout, training = job.layout, job.training
    strategy = run.Config(
        Strategy,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        context_parallel_size=layout.context_parallel,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=_DTYPES[precision],
        ckpt_async_save=machine.gpu,
        ckpt_parallel_load=machine.gpu,
        ckpt_parallel_save=machine.gpu,
        # For checkpoints that can be resumed at another TP x PP; CheckpointCallback chooses which are.
        distrib_optim_fully_reshardable_mem_efficient=True,
        ckpt_load_strictness="log_all",  # extra states may be missing; Strategy refuses missing weights
        ddp=data_parallelism(layout, gpu=machine.gpu),
    )
    callbacks = [
        *carry_optimizer_state(job),
        run.Config(
            MetricsLog,
            path=str(job.metrics),
            tokens_per_step=training.tokens_per_step,
            total_steps=training.steps,
            job=str(job.file),
            precision=precision,
        ),
        *hold_masks(job),
        *distill(job),
        *prune_while_training(job),
        *learn_masks(job),
        *follow_losses(job),
        run.Config(SaveOnTimeOrSignal, minutes=training.checkpoint_minutes),
    ]
    if machine.gpu and layout.tensor_parallel * layout.pipeline_parallel > 1:
        # The settings above overlap data parallel communication; this callback overlaps that of TP and PP.
        overlapped = machine.tp_overlap(layout, precision)
        ddp = strategy.ddp  # told again, because without data parallelism it would set these to its own defaults
        callbacks.append(
            run.Config(
                MegatronCommOverlapCallback,
                tp_comm_overlap=overlapped,
                bucket_size=ddp.bucket_size,
                overlap_grad_reduce=ddp.overlap_grad_reduce,
                overlap_param_gather=ddp.overlap_param_gather,
            )
        )
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", min(layout.processes, machine.processes_per_node)))
    return run.Config(
        nl.Trainer,
        accelerator="gpu" if machine.gpu else "cpu",
        devices=local_processes,
        num_nodes=layout.processes // local_processes,
        max_steps=training.steps,
        strategy=strategy,
        plugins=mixed_precision(precision),
        val_check_interval=step_interval(training.steps, training.validations),
        check_val_every_n_epoch=None,  # count steps over the whole run, so that resuming does not shift validations
        limit_val_batches=1.0,  # one whole epoch of the same validation windows each time
        limit_test_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,  # NeMo's printer deadlocks with more than one rank; MetricsLog reports instead
        logger=False,  # NeMoLogger adds them
        use_distributed_sampler=False,
        callbacks=callbacks,
    )


def data_parallelism(layout: Parallelism, *, gpu: bool) -> run.Config:
    """Return how Megatron shares gradients and optimizer state among data parallel ranks.

    Args:
        layout: The run's layout.
        gpu: Whether the ranks have GPUs, where communication overlaps with computation.
    """
    overlap = gpu and layout.distributed_optimizer
    return run.Config(
        DistributedDataParallelConfig,
        use_distributed_optimizer=layout.distributed_optimizer,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        average_in_collective=gpu,  # NCCL divides while it sums; gloo cannot
        # NeMo's recommendation. Megatron's default depends on DP, and a checkpoint of buckets fits only the same.
        bucket_size=_BUCKET if overlap else None,
    )


def mixed_precision(precision: str) -> run.Config:
    """Return NeMo's precision plugin for bf16, fp32, or FP8 with current scaling."""
    if precision == "fp8":
        plugin = bf16_with_fp8_current_scaling_mixed()
        plugin.fp8_param_gather = False  # weights that exist only in FP8 cannot be masked
        return plugin
    return run.Config(
        MegatronMixedPrecision,
        precision={"bf16": "bf16-mixed", "fp32": "32"}[precision],
        params_dtype=_DTYPES[precision],
        pipeline_dtype=_DTYPES[precision],
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )


def weights_and_biases(job: TrainingJob) -> run.Config | None:
    """Return the Weights & Biases logger if the environment variable WANDB_PROJECT is set, otherwise None."""
    project = os.environ.get("WANDB_PROJECT")
    if not project:
        return None
    # Arms of different runs have the same names, so the folder is part of the id; it is the same on resuming.
    identity = f"{job.name}-{sha256_json(str(job.folder))[:12]}"
    return run.Config(WandbLogger, project=project, name=job.name, id=identity, save_dir=str(job.folder))


def hold_masks(job: TrainingJob, *, sparse: bool = False) -> list[run.Config]:
    """Return the callback that holds the masks of the initial checkpoint; an empty list for a dense model.

    Args:
        job: The training job.
        sparse: Whether the model is known to be sparse although its initial checkpoint may not exist yet.
    """
    if not sparse and not (job.initial / "context" / MASKS_FILE).is_file():
        return []
    return [
        run.Config(
            HoldMasks,
            initial=str(job.initial),
            path=str(job.metrics),
            clip_before_mask=job.training.clip_before_mask,
            every_steps=job.training.mask_check_steps or CHECK_STEPS,
        )
    ]


def checkpointing(job: TrainingJob) -> run.Config:
    """Return the checkpoint callback, which keeps the two newest checkpoints, and those that the job names."""
    return run.Config(
        CheckpointCallback,
        initial=str(job.initial),
        keep=list(job.keep),
        dirpath=str(job.checkpoints),
        filename="{step}",
        save_last=True,
        save_top_k=0,  # also keeping the best checkpoints would double every save
        save_on_train_epoch_end=True,  # rather than after every validation
        every_n_train_steps=step_interval(job.training.steps, job.training.checkpoints),
        save_optim_on_train_end=True,
    )


def optimizer(job: TrainingJob, precision: str) -> run.Config:
    """Return AdamW with the job's schedule; norms and biases have no weight decay unless the job enables it."""
    training = job.training
    return run.Config(
        nl.MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=training.peak_learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_betas[0],
            adam_beta2=training.adam_betas[1],
            adam_eps=training.adam_eps,
            clip_grad=training.clip_grad_norm,
            bf16=precision != "fp32",
            fp16=False,
            params_dtype=_DTYPES[precision],
            use_distributed_optimizer=job.layout.distributed_optimizer,
        ),
        lr_scheduler=schedule(job),
        no_weight_decay_cond=decays_everything if training.weight_decay_on == "all" else None,
    )


def schedule(job: TrainingJob) -> run.Config:
    """Return the learning-rate schedule.

    By default this is NeMo's linear warm-up and cosine decay; the job may instead choose quadratic warm-up, a linear
    decay over its last steps (WSD), or a part of a longer schedule.
    """
    training = job.training
    if job.all_steps is not None or training.decay_steps is not None:
        steps = job.all_steps or training.steps
        whole = training.model_copy(update={"tokens": float(steps * training.tokens_per_step)})
        return run.Config(
            PartOfSchedule,
            warmup=training.warmup,
            first_step=job.first_step,
            all_steps=steps,
            warmup_steps=whole.warmup_steps,
            min_ratio=training.min_learning_rate_ratio,
            decay_steps=whole.decay_steps,
        )
    if training.warmup == "quadratic":
        return run.Config(
            QuadraticWarmupCosine,
            max_steps=training.steps,
            warmup_steps=training.warmup_steps,
            min_ratio=training.min_learning_rate_ratio,
        )
    return run.Config(
        nl.lr_scheduler.CosineAnnealingScheduler,
        max_steps=training.steps,
        warmup_steps=training.warmup_steps,
        constant_steps=0,
        min_lr=training.min_learning_rate_ratio * training.peak_learning_rate,
    )


def step_interval(steps: int, times: int) -> int:
    """Return every how many steps an event occurs if it occurs ``times`` times in ``steps``, including at the end."""
    return max(1, steps // times)


_BUCKET = 128 * 1024**2
"""Gradients that are reduced together."""
_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
