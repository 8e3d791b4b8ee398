"""From a TrainingJob to NeMo: one `run.Partial` of `llm.pretrain` for parent, pruned and scratch alike.

The architecture comes from the initial checkpoint, so it cannot differ from the weights; everything else comes from
the job. The same object trains on a CPU and on a cluster: without Transformer Engine the fused kernels are switched
off and attention is PyTorch's.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import fiddle
import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning import io
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

from nemo_pvs.training.attention import causal_data_step, layer_spec
from nemo_pvs.training.callbacks import Checkpoint, MetricsLog
from nemo_pvs.training.data import PretrainingData
from nemo_pvs.training.job import TrainingJob

# Kernels of Transformer Engine and Apex that NeMo's Llama configs ask for; without them Megatron refuses the config.
FUSED_KERNELS = (
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "cross_entropy_loss_fusion",
    "persist_layer_norm",
)


def pretrain_recipe(job: TrainingJob) -> run.Partial:
    """Return NeMo's pretraining of ``job``, ready to be built and called on every rank."""
    precision = resolve_precision(job.training.precision)
    return run.Partial(
        llm.pretrain,
        model=model(job, precision),
        data=data(job),
        trainer=trainer(job, precision),
        log=run.Config(
            nl.NeMoLogger,
            log_dir=str(job.folder),
            name="nemo",
            use_datetime_version=False,
            update_logger_directory=False,
            ckpt=checkpointing(job),
        ),
        optim=optimizer(job, precision),
        resume=run.Config(
            nl.AutoResume,
            resume_if_exists=True,
            resume_ignore_no_checkpoint=True,
            restore_config=run.Config(nl.RestoreConfig, path=str(job.initial)),
        ),
    )


def model(job: TrainingJob, precision: str) -> run.Config:
    """Return the model of the initial checkpoint, set up for the kernels that this machine has."""
    stored = io.load_context(job.initial / "context", subpath="model", build=False)
    config = fiddle.cast(run.Config, stored.config)
    config.seq_length = job.training.sequence_length
    config.params_dtype = config.pipeline_dtype = _DTYPES[precision]
    config.bf16, config.fp16 = precision == "bf16", False
    if not has_transformer_engine():
        for kernel in FUSED_KERNELS:
            setattr(config, kernel, False)
        config.transformer_layer_spec = layer_spec
        config.data_step_fn = causal_data_step
        # Initialisation must not ask for a CUDA generator; the restored weights replace it in any case.
        config.use_cpu_initialization = not torch.cuda.is_available()
    return run.Config(fiddle.get_callable(stored), config=config)


def data(job: TrainingJob) -> run.Config:
    """Return the data module: the job's tokens in an order that depends on the seed alone."""
    training = job.training
    return run.Config(
        PretrainingData,
        paths={
            "train": [job.data["train"]],
            "validation": [job.data["validation"]],
            "test": [job.data["validation"]],  # NeMo wants all three; nothing reads this one
        },
        split=None,
        tokenizer=run.Config(AutoTokenizer, pretrained_model_name=str(job.initial / "context" / "tokenizer")),
        seq_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        seed=training.seed,
        num_workers=0 if not torch.cuda.is_available() else 4,
        pin_memory=torch.cuda.is_available(),
        index_mapping_dir=str(job.folder / "index"),
    )


def trainer(job: TrainingJob, precision: str) -> run.Config:
    """Return the trainer: Megatron's strategy in the job's layout, validation at equal distances."""
    layout, training = job.layout, job.training
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=_DTYPES[precision],
        ckpt_async_save=torch.cuda.is_available(),
        ckpt_parallel_load=torch.cuda.is_available(),
        ckpt_parallel_save=torch.cuda.is_available(),
        ckpt_optim_fully_reshardable=True,  # resume at another TP x PP x DP
        ckpt_load_strictness="log_all",
        ddp=run.Config(
            DistributedDataParallelConfig,
            use_distributed_optimizer=layout.distributed_optimizer,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=True,
            overlap_grad_reduce=torch.cuda.is_available() and layout.distributed_optimizer,
            overlap_param_gather=torch.cuda.is_available() and layout.distributed_optimizer,
        ),
    )
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", layout.processes))
    return run.Config(
        nl.Trainer,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=local_processes,
        num_nodes=layout.processes // local_processes,
        max_steps=training.steps,
        strategy=strategy,
        plugins=run.Config(
            MegatronMixedPrecision,
            precision={"bf16": "bf16-mixed", "fp32": "32"}[precision],
            params_dtype=_DTYPES[precision],
            pipeline_dtype=_DTYPES[precision],
            autocast_enabled=False,
            grad_reduce_in_fp32=True,
        ),
        val_check_interval=interval(training.steps, training.validations),
        check_val_every_n_epoch=None,  # count steps over the whole run, so that resuming does not shift validations
        limit_val_batches=1.0,  # one whole epoch of the validation windows, each time the same
        limit_test_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,  # NeMo's printer deadlocks with more than one rank; MetricsLog reports instead
        logger=False,
        use_distributed_sampler=False,
        callbacks=[
            run.Config(
                MetricsLog, path=str(job.metrics), tokens_per_step=training.tokens_per_step, total_steps=training.steps
            ),
        ],
    )


def checkpointing(job: TrainingJob) -> run.Config:
    """Return the checkpoint callback: one checkpoint, the newest, with optimizer state, replaced by the next."""
    return run.Config(
        Checkpoint,
        initial=str(job.initial),
        dirpath=str(job.checkpoints),
        filename="{step}",
        save_last=True,
        save_top_k=0,  # best-so-far copies besides the newest one would double every save
        save_on_train_epoch_end=True,  # and not after every validation
        every_n_train_steps=interval(job.training.steps, job.training.checkpoints),
        save_optim_on_train_end=True,
    )


def optimizer(job: TrainingJob, precision: str) -> run.Config:
    """Return AdamW with linear warm-up and cosine decay; norms are not decayed."""
    training = job.training
    return run.Config(
        nl.MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_betas[0],
            adam_beta2=training.adam_betas[1],
            adam_eps=training.adam_eps,
            clip_grad=training.clip_grad_norm,
            bf16=precision == "bf16",
            fp16=False,
            params_dtype=_DTYPES[precision],
            use_distributed_optimizer=job.layout.distributed_optimizer,
        ),
        lr_scheduler=run.Config(
            nl.lr_scheduler.CosineAnnealingScheduler,
            max_steps=training.steps,
            warmup_steps=round(training.warmup_fraction * training.steps),
            constant_steps=0,
            min_lr=training.min_learning_rate_ratio * training.learning_rate,
        ),
    )


def interval(steps: int, times: int) -> int:
    """Return the distance in steps at which something happens ``times`` times in ``steps``, the end included."""
    return max(1, steps // times)


def resolve_precision(wanted: str) -> str:
    """Return bf16 or fp32: ``auto`` is bf16 where the device has arithmetic for it, for it is slow elsewhere."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


@cache
def has_transformer_engine() -> bool:
    """Return whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
