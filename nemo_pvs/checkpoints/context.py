"""The ``context/`` folder of a NeMo checkpoint: the model's configuration, written and read without NeMo.

NeMo describes a model as Fiddle configs (a class and its arguments) in ``io.json``. This module writes that JSON
directly, so that stock NeMo builds the model from it, and reads the JSON of checkpoints that NeMo itself wrote.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints import fiddle_json, nemo_classes
from nemo_pvs.checkpoints.assets import asset_files
from nemo_pvs.checkpoints.fiddle_json import Config, Symbol
from nemo_pvs.errors import UserError
from nemo_pvs.files import read_json, write_json

_HUGGINGFACE_CONFIG = "huggingface_config.json"
_TOKENIZER = "tokenizer"
_GENERATION = Path("artifacts", "generation_config.json")  # where NeMo's importer leaves it

# Hugging Face key, NeMo field.
_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "initializer_range": "init_method_std",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
_ROPE_SCALING_FIELDS = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}

# What transformers' LlamaConfig takes for a key that config.json leaves out; sizes are explicit by now.
_HUGGINGFACE_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}


def write_context(folder: Path, config: Mapping[str, Any], assets: Iterable[Path], *, vocab_rows: int) -> None:
    """Write a context that ``nemo.lightning.io.load_context`` reads.

    Args:
        folder: The ``context`` folder to make.
        config: The model's Hugging Face config, sizes and dtype explicit; kept as it is beside NeMo's form.
        assets: Tokenizer files and generation config. Without any tokenizer file the model's tokenizer is None.
        vocab_rows: Rows of the stored embedding, padding included.

    Raises:
        UserError: NeMo's Llama cannot express the config.
    """
    model_config = _nemo_config(config, vocab_rows)
    folder.mkdir(parents=True)
    tokenizer = None
    for asset in assets:
        if asset.name == _GENERATION.name:
            destination = folder / _GENERATION
        else:
            destination = folder / _TOKENIZER / asset.name
            tokenizer = Config(
                Symbol("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer"),
                {"pretrained_model_name": _TOKENIZER},
            )
        destination.parent.mkdir(exist_ok=True)
        shutil.copyfile(asset, destination)
    model = Config(Symbol(nemo_classes.MODULE, "LlamaModel"), {"config": model_config, "tokenizer": tokenizer})
    context = Config(Symbol("nemo.lightning.io.pl", "TrainerContext"), {"model": model, "trainer": None, "extra": {}})
    write_json(folder / "io.json", fiddle_json.dump(context))
    write_json(folder / _HUGGINGFACE_CONFIG, dict(config))


def read_context(folder: Path, *, vocab_rows: int, dtype: str) -> dict[str, Any]:
    """Return the Hugging Face config of a checkpoint: the one that we kept, or one rebuilt from NeMo's.

    Args:
        folder: The ``context`` folder.
        vocab_rows: Rows of the stored embedding; the vocabulary where NeMo's config does not state it.
        dtype: Name of the stored dtype, for a rebuilt config.

    Raises:
        UserError: there is no usable context, or its model is not a Llama that Hugging Face can express.
    """
    if (folder / _HUGGINGFACE_CONFIG).is_file():
        config: dict[str, Any] = read_json(folder / _HUGGINGFACE_CONFIG)
        return config
    config = _huggingface_config(folder)
    config["vocab_size"] = config["vocab_size"] or vocab_rows
    config["torch_dtype"] = dtype
    if (folder / _GENERATION).is_file():
        generation = read_json(folder / _GENERATION)
        config.update({key: generation[key] for key in ("bos_token_id", "eos_token_id") if key in generation})
    return config


def context_assets(folder: Path) -> tuple[Path, ...]:
    """Return the tokenizer files and the generation config of a checkpoint."""
    tokenizer = fiddle_json.find(_io_json(folder), "<root>.model.tokenizer")
    place = tokenizer.arguments.get("pretrained_model_name") if tokenizer else None
    assets = {file.name: file for file in asset_files((folder / _GENERATION).parent)}
    if isinstance(place, str) and (folder / place).resolve().is_relative_to(folder.resolve()):
        assets.update({file.name: file for file in asset_files(folder / place)})
    return tuple(assets[name] for name in sorted(assets))


def _io_json(folder: Path) -> Any:
    return read_json(folder / "io.json")


def _nemo_config(config: Mapping[str, Any], vocab_rows: int) -> Config:
    """Return the NeMo config that describes a Hugging Face config, every field explicit."""
    config = {**_HUGGINGFACE_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"NeMo's Llama has the activation silu, not {activation}; this model cannot be converted.")
    dtype = config.get("torch_dtype") or config["dtype"]
    fields = {
        **{field: config[key] for key, field in _FIELDS.items()},
        "vocab_size": vocab_rows,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": Symbol("torch", dtype),
    }
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Config(Symbol(nemo_classes.MODULE, nemo_classes.PLAIN), fields)
    missing = [key for key in _ROPE_SCALING_FIELDS if key not in scaling]
    if kind != "llama3" or missing:
        what = f"lacks {', '.join(missing)}" if kind == "llama3" else f"is {kind}, which NeMo's Llama does not have"
        raise UserError(f"The rope_scaling of this model {what}; only none and llama3 can be converted.")
    fields.update({field: scaling[key] for key, field in _ROPE_SCALING_FIELDS.items()})
    return Config(Symbol(nemo_classes.MODULE, nemo_classes.SCALED), fields)


def _huggingface_config(folder: Path) -> dict[str, Any]:
    """Return the Hugging Face config of the model that NeMo describes in ``folder``; the vocabulary may be None."""
    path = folder / "io.json"
    stored = fiddle_json.find(_io_json(folder), "<root>.model.config", "<root>.config")
    if stored is None:
        raise UserError(f"{path} describes no model; use the checkpoint folder that NeMo wrote.")
    if stored.symbol.module != nemo_classes.MODULE or stored.symbol.name not in nemo_classes.KNOWN:
        raise UserError(
            f"{path} has the config class {stored.symbol.module}.{stored.symbol.name}, which is not a Llama 2 or 3 "
            f"of NeMo; put the model's Hugging Face config beside it as {_HUGGINGFACE_CONFIG}."
        )
    for field, wanted in nemo_classes.REQUIRED.items():
        value = stored.arguments.get(field, wanted)
        if value != wanted:
            raise UserError(f"{path} has {field}={value}, which a Llama in the Hugging Face format cannot have.")
    fields = {**nemo_classes.defaults(stored.symbol.name), **stored.arguments}
    missing = [
        field
        for field in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
        if field not in fields
    ]
    if missing:
        raise UserError(f"{path} does not state {', '.join(missing)}; use the checkpoint folder that NeMo wrote.")
    fields["num_query_groups"] = fields["num_query_groups"] or fields["num_attention_heads"]
    fields["kv_channels"] = fields["kv_channels"] or fields["hidden_size"] // fields["num_attention_heads"]
    scaling = {key: fields.get(field) for key, field in _ROPE_SCALING_FIELDS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: fields[field] for key, field in _FIELDS.items()},
        "rope_theta": float(fields["rotary_base"]),
        "rope_scaling": None if scaling["factor"] is None else {"rope_type": "llama3", **scaling},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
