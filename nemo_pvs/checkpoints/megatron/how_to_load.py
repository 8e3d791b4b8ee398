"""How to load a checkpoint of ``write_megatron``, for the user: Megatron-LM does not restore every setting."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.megatron.rope import rope_factor
from nemo_pvs.checkpoints.megatron.source import MegatronSource
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.megatron_run import latest_checkpoint

_DTYPES = {"bfloat16": ["--bf16"], "float16": ["--fp16"]}


def how_to_load(target: Path) -> tuple[str, ...]:
    """Return what a user of a written checkpoint should know, in sentences and lines to copy."""
    source = MegatronSource(latest_checkpoint(target))
    shape = shape_of(source)
    if shape.uneven:  # it wants each layer's settings in the terms of a Nemotron config, and scaled rope
        megatron_lm = "Megatron-LM does not load layers of different sizes; for it, pad them with --uneven pad."
    else:
        megatron_lm = (
            f"Megatron-LM: --load {shlex.quote(str(target.resolve()))} --use-checkpoint-args --ckpt-format torch_dist "
            f"--finetune {' '.join(unrestored_flags(source.config))} (it restores all other settings from the "
            "checkpoint, but not these)."
        )
    notes = [
        f'Megatron-Bridge: checkpoint.pretrained_checkpoint = "{target.resolve()}" in the training config, or '
        f'megatron.bridge.training.model_load_save.load_megatron_model("{source.folder.resolve()}").',
        megatron_lm,
    ]
    if {"attention_bias", "mlp_bias"} & {*shape.features}:
        notes.append(
            "Megatron-Bridge trains the biases of this model, but its own export to Hugging Face fails on them; use "
            "pvs convert --to hf."
        )
    if source.masks.names:
        notes.append(
            f"The masks are in {source.folder}, but neither program holds pruned weights at zero; train with pvs or "
            "apply the masks after training."
        )
    return tuple(notes)


def unrestored_flags(config: Mapping[str, Any]) -> list[str]:
    """Return the arguments of Megatron-LM that ``--use-checkpoint-args`` does not restore, for a model's config."""
    layout = Layout.for_config(config)
    stated = {**layout.defaults, **config}
    flags = ["--norm-epsilon", f"{stated['rms_norm_eps']:g}", "--init-method-std", f"{stated['initializer_range']:g}"]
    factor = rope_factor(config)
    if factor is not None:
        flags += ["--use-rope-scaling", "--rope-scaling-factor", f"{factor:g}"]
    if "qk_norm" in layout.table.get("always", ()):
        flags.append("--qk-layernorm")
    window = stated.get("sliding_window") if "sliding_window" in layout.defaults else None
    if window is not None:
        flags += ["--window-size", f"{window - 1},0"]
    return [*flags, "--make-vocab-size-divisible-by", "1", *_DTYPES.get(str(_dtype(config)), [])]


def _dtype(config: Mapping[str, Any]) -> Any:
    return config.get("torch_dtype") or config.get("dtype")
