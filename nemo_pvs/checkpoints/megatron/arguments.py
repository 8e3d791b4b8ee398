"""The command-line arguments that Megatron-LM stores in ``common.pt``, as a Hugging Face config and back."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.files.pytorch_bin import enum_member, load_harmless
from nemo_pvs.checkpoints.megatron.rope import rope_scaling
from nemo_pvs.errors import UserError

# Hugging Face key, argument of Megatron-LM.
_ARGUMENTS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "initializer_range": "init_method_std",
}

# Arguments that Megatron-LM 0.16 renamed.
_RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}

# Arguments that make a Megatron-LM GPT a Llama, and values that a Llama must have if the argument is present at all.
_LLAMA = {"swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope"}
_PLAIN = {
    "activation_func_clamp_value": None,
    "add_qkv_bias": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_experts": None,
    "qk_l2_norm": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": None,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
    "window_size": None,
}

_ELSE = "put the model's Hugging Face config.json next to it"


# Megatron's enumerations, and the other globals that Megatron-Core expects there (its safe_globals.py).
_EXPECTED = ("megatron.", "numpy.", "pathlib.", "types.SimpleNamespace")


class _Inert:
    """Replaces the expected globals other than the arguments, so that none of them is imported, built or called."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def config_from_arguments(common: Path, *, vocab_rows: int, dtype: str) -> dict[str, Any]:
    """Return the Hugging Face config of a Llama that Megatron-LM trained.

    Args:
        common: The checkpoint's ``common.pt``.
        vocab_rows: Rows of the stored embedding; the vocabulary size if the arguments do not state it.
        dtype: Name of the stored dtype.

    Raises:
        UserError: there are no arguments, they do not describe a Llama, or the file would run code.
    """
    arguments = _arguments(common)
    missing = [name for name in (*_ARGUMENTS.values(), *_LLAMA) if name not in arguments]
    if missing:
        raise UserError(f"{common} does not state {', '.join(missing)}; {_ELSE}.")
    for name, wanted in {**_LLAMA, **_PLAIN}.items():
        value = arguments.get(name, wanted)
        if value != wanted:
            raise UserError(
                f"{common} has {name}={value}, which a Llama in the Hugging Face format cannot have; if it is another "
                f"family, {_ELSE}, or name it by --config."
            )
    grouped = arguments.get("group_query_attention", False)
    biases = bool(arguments.get("add_bias_linear", True))  # Megatron-LM's default
    scaling = rope_scaling(arguments.get("rope_scaling_factor", 8.0)) if arguments.get("use_rope_scaling") else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: arguments[name] for key, name in _ARGUMENTS.items()},
        "num_key_value_heads": arguments["num_query_groups" if grouped else "num_attention_heads"],
        "vocab_size": arguments.get("vocab_size") or vocab_rows,
        "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": biases,
        "mlp_bias": biases,
        "torch_dtype": dtype,
    }


# Argument of Megatron-LM, field of Megatron-Bridge's provider.
_FIELDS = {
    **{
        name: name
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "seq_length",
            "init_method_std",
            "rotary_percent",
            "rotary_interleaved",
            "add_bias_linear",
            "add_qkv_bias",
            "qk_layernorm",
            "attention_dropout",
            "hidden_dropout",
            "normalization",
            "position_embedding_type",
            "make_vocab_size_divisible_by",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "bf16",
            "fp16",
            "rope_scaling_factor",
        )
    },
    "max_position_embeddings": "seq_length",
    "padded_vocab_size": "vocab_size",
    "use_rope_scaling": "rope_scaling",
    **{name: field for old, field in _RENAMED.items() for name in (old, field)},
}


def arguments_of(fields: Mapping[str, Any], iteration: int) -> argparse.Namespace:
    """Return the arguments of a Megatron-LM run that saved a model, as ``--use-checkpoint-args`` reads them.

    Args:
        fields: The fields of Megatron-Bridge's provider for the model (``run_config.provider_fields``).
        iteration: The iteration of the checkpoint.

    Raises:
        UserError: the rotary base is not whole, as this argument must be.
    """
    window, dtype, base = fields["window_size"], fields["params_dtype"], fields["rotary_base"]
    if base != int(base):
        raise UserError(
            f"The model has rope_theta {base}, but Megatron-LM's --rotary-base is a whole number; keep the model in "
            "the NeMo or Hugging Face format."
        )
    return argparse.Namespace(
        **{name: fields[field] for name, field in _FIELDS.items()},
        rotary_base=int(base),
        window_size=tuple(window) if window else None,
        params_dtype=getattr(torch, dtype.name),
        group_query_attention=True,
        swiglu=True,
        squared_relu=False,
        untie_embeddings_and_output_weights=not fields["share_embeddings_and_output_weights"],
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_seq_len_interpolation_factor=None,
        apply_query_key_layer_scaling=False,
        num_experts=None,
        multi_latent_attention=False,
        heterogeneous_layers_config_path=None,
        heterogeneous_layers_config_encoded_json=fields.get("heterogeneous_layers_config_encoded_json"),
        transformer_impl="transformer_engine",
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        iteration=iteration,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        world_size=1,
        data_parallel_size=1,
    )


def _arguments(common: Path) -> Mapping[str, Any]:
    if not common.is_file():
        raise UserError(f"{common.parent} has no config.json and no common.pt; {_ELSE}.")
    inert = [(_Inert, name) for name in _named(common) if name.startswith(_EXPECTED)]
    # Python 3.11.0 to 3.11.3 pickles the member of an enumeration as getattr(members, name).
    with torch.serialization.safe_globals([argparse.Namespace, *inert, (_enum_member, "builtins.getattr")]):
        content = load_harmless(common)
    arguments = content.get("args") if isinstance(content, dict) else None
    if not isinstance(arguments, argparse.Namespace):
        raise UserError(f"{common} does not contain the arguments of a Megatron-LM run; {_ELSE}.")
    values = vars(arguments)
    return {**{old: values[new] for old, new in _RENAMED.items() if new in values}, **values}


def _enum_member(members: Any, name: str) -> Any:
    """Stand in for ``getattr``: of a stand-in, or of an enumeration, which Megatron allows once it is imported."""
    if members is _Inert:
        return _Inert()
    return enum_member(members, name)


def _named(common: Path) -> list[str]:
    """Return the names of the classes and functions that a file refers to, without building or calling any."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(common))
    except Exception:  # a broken file can raise anything; loading it reports what is wrong
        return []
