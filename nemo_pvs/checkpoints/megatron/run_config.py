"""Megatron-Bridge's ``run_config.yaml``, which describes the model: written and read as data, without Bridge.

Bridge imports what the file names under ``_target_``, and calls it. Here such a name is only compared with the names
in the tables of conversions/.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_pvs.checkpoints.huggingface.config import normal_config
from nemo_pvs.checkpoints.megatron.layers import block_configs, layer_sizes
from nemo_pvs.checkpoints.megatron.rope import rope_factor, rope_scaling
from nemo_pvs.checkpoints.nemo.fiddle_json import Symbol
from nemo_pvs.checkpoints.nemo.model_fields import from_fields, to_fields
from nemo_pvs.checkpoints.nemo.nemo_classes import FIELDS, PLAIN, NemoFamily
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout, layouts
from nemo_pvs.system.files import read_yaml
from nemo_pvs.system.progress import say_once

RUN_CONFIG = "run_config.yaml"

_CONFIG = "megatron.bridge.training.config"
_LAYERS = "heterogeneous_layers_config_encoded_json"

# Fields that change what a model computes and that NeMo's classes lack, with the values of all families here.
_PLAIN = {
    **PLAIN,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "mrope_section": None,
    "mtp_num_layers": None,
    "qk_l2_norm": False,
}

# Megatron's own class, and those of its defaults that differ from what its subclass for each of these families sets.
_GENERIC = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_OF_GPT_2 = ("activation_func", "add_bias_linear", "gated_linear_unit", "normalization", "position_embedding_type")

# What Bridge's providers of these families set, and those of other families may not.
_SETTINGS: Mapping[str, Any] = {
    "activation_func": PLAIN["activation_func"],
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "persist_layer_norm": True,
    "apply_rope_fusion": True,
    # The stored rows are the vocabulary. Bridge can pad it while it loads a model, but would export stored padding.
    "should_pad_vocab": False,
    "make_vocab_size_divisible_by": 1,
    # Bridge's training looks these up without a default.
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "hf_model_id": None,
}


def provider_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Bridge's model provider for a model, classes and functions as ``Symbol``.

    Every field that any supported family sets is stated, since the defaults are those of other models.

    Args:
        config: The model's Hugging Face config with explicit sizes and dtype.

    Raises:
        UserError: Bridge cannot express the model.
    """
    family = NemoFamily(Layout.for_config(config))
    layout, shape = family.layout, family.layout.shape(config)
    factor = rope_factor(config)
    provider = _section(layout).get("uneven" if shape.uneven else "provider")
    if provider is None:
        raise UserError(
            f"No provider of Megatron-Bridge is known for a {layout.family} with layers of different sizes; pad them "
            "with pvs convert --uneven pad."
        )
    fields = {
        "_target_": provider,
        **_SETTINGS,
        **family.fixed,
        **to_fields(family, config, _names(layout), vocab_rows=shape.vocab),
        "rope_scaling": factor is not None,
        "rope_scaling_factor": factor or 1.0,
    }
    fields["autocast_dtype"] = fields["params_dtype"]
    window = fields["window_size"]
    if window is not None:  # Megatron counts the keys before a query, Hugging Face its own key as well
        fields |= {"window_size": [window[0] - 1, 0], "cp_comm_type": "a2a"}
    if shape.uneven:
        # Those in the Hugging Face config are of a model that all layers fit into.
        fields |= {_LAYERS: block_configs(shape), "num_attention_heads": shape.uneven[0].heads}
    return fields


def write_run_config(path: Path, fields: Mapping[str, Any], tokenizer: Path | None) -> None:
    """Write a ``run_config.yaml``.

    Args:
        path: The file.
        fields: As ``provider_fields`` returns them.
        tokenizer: The folder of the tokenizer, absolute, as Bridge passes it to ``transformers``; None without one.
    """
    model = {
        name: {"_target_": f"{value.module}.{value.name}", "_call_": False} if isinstance(value, Symbol) else value
        for name, value in fields.items()
    }
    checkpoint = {"ckpt_format": "torch_dist", "save_optim": False, "save_rng": False, "fully_parallel_save": True}
    content: dict[str, Any] = {
        "_target_": f"{_CONFIG}.ConfigContainer",
        "model": model,
        "tokenizer": None,
        "checkpoint": {"_target_": f"{_CONFIG}.CheckpointConfig", **checkpoint},
    }
    if tokenizer is not None:
        content["tokenizer"] = {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(tokenizer),
            "hf_tokenizer_kwargs": {},
        }
    path.write_text(yaml.safe_dump(content))


def read_run_config(path: Path, *, vocab_rows: int, dtype: str) -> dict[str, Any]:
    """Return the Hugging Face config of the model that a ``run_config.yaml`` describes.

    Args:
        path: The file, which Bridge or ``write_run_config`` wrote.
        vocab_rows: Rows of the stored embedding; the vocabulary size if the file does not state it.
        dtype: Name of the stored dtype.

    Raises:
        UserError: the file is broken, or its model is of a family that no table describes.
    """
    content = read_yaml(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path} does not describe a model; use the file that Megatron-Bridge wrote.")
    fields = {name: _decode(value) for name, value in model.items()}
    family = _family(fields, path)
    missing = [field for field in _OF_GPT_2 if field not in fields]
    if missing and fields["_target_"] == _GENERIC:
        raise UserError(
            f"{path} does not state {', '.join(missing)}, and GPTModelProvider's defaults are those of GPT-2; use "
            "the file that Megatron-Bridge wrote."
        )
    factor = fields.get("rope_scaling_factor") if fields.get("rope_scaling") else None
    config = from_fields(
        family,
        {**fields, "window_size": _window(fields.get("window_size"), path)},
        _names(family.layout),
        path,
        rope_scaling=None if factor is None else rope_scaling(factor),
        vocab_rows=vocab_rows,
    )
    if fields.get(_LAYERS):
        layout = family.layout
        layers = layer_sizes(fields[_LAYERS], fields, path)
        config = layout.config(layout.shape(config).with_layers(layers), config)
    return normal_config({**config, "torch_dtype": dtype, **_special_tokens(model)}, path)


def _section(layout: Layout) -> Mapping[str, Any]:
    if "bridge" not in layout.table:
        raise UserError(
            f"No provider of Megatron-Bridge is known for the family {layout.family}; if it has one, describe it "
            f"under bridge in conversions/{layout.family}.yaml."
        )
    return layout.table["bridge"]


def _names(layout: Layout) -> dict[str, str]:
    """Return the Hugging Face key and the provider's field of every setting that both have."""
    window = {"sliding_window": "window_size"} if "sliding_window" in layout.defaults else {}
    return {**FIELDS, **window}


def _decode(value: Any) -> Any:
    """Return a field's value; a function, class or dtype is stored as its name and not to be called."""
    if isinstance(value, dict) and value.get("_call_") is False and isinstance(value.get("_target_"), str):
        module, _, name = value["_target_"].rpartition(".")
        return Symbol(module, name)
    return value


def _family(fields: Mapping[str, Any], path: Path) -> NemoFamily:
    """Return the family that a provider's class and fields describe; several share ``GPTModelProvider``."""
    target = fields.get("_target_")
    families = []
    for layout in layouts():
        section = layout.table.get("bridge", {"reads": {}})
        names = [f"{module}.{name}" for module, classes in section["reads"].items() for name in classes]
        if target in (*names, section.get("uneven")):
            families.append(NemoFamily(layout))
    if not families:
        raise UserError(
            f"{path} has the model class {target}, which no table in conversions/ lists; put the model's Hugging Face "
            "config next to it as config.json, if it is of a family listed there."
        )

    def differing(family: NemoFamily) -> list[str]:
        fixed = {**_PLAIN, **family.fixed}
        return [field for field, wanted in fixed.items() if fields.get(field, wanted) != wanted]

    family = min(families, key=lambda family: len(differing(family)))
    for field in differing(family)[:1]:
        raise UserError(
            f"{path} has {field}={fields[field]}, which a {family.layout.family} in the Hugging Face format cannot "
            "have; such a model is not supported."
        )
    return family


def _window(window: Any, path: Path) -> list[int] | None:
    """Return Hugging Face's window, in the form that ``from_fields`` expects.

    Raises:
        UserError: it does not end with the query.
    """
    if window is None:
        return None
    if not isinstance(window, list) or len(window) != 2 or window[1] != 0 or not isinstance(window[0], int):
        raise UserError(
            f"{path} has window_size={window}, which is not a window of keys before a query; such a model is not "
            "supported."
        )
    say_once(
        f"{path} has window_size={window}, with which Megatron attends to {window[0] + 1:,} tokens, so that is the "
        f"window; Megatron-Bridge before 0.4.2 wrote the same for models with a window of {window[0]:,}."
    )
    return [window[0] + 1, 0]


def _special_tokens(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the first and last token of a text, if Bridge kept the model's generation config."""
    generation = model.get("generation_config")
    values = generation.get("config_dict") if isinstance(generation, dict) else None
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key in ("bos_token_id", "eos_token_id") if values.get(key) is not None}
