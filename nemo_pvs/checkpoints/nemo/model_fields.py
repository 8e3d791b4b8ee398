"""A model's settings as the fields of Megatron's config classes, which NeMo and Megatron-Bridge share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.nemo.fiddle_json import Symbol
from nemo_pvs.checkpoints.nemo.nemo_classes import PLAIN, NemoFamily
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout

BY_LAYER = ("ffn_hidden_size_by_layer", "num_attention_heads_by_layer", "num_query_groups_by_layer")
"""Fields of our config classes for uneven layers (megatron/uneven.py), in the order of LayerSizes."""

# Named first when they are missing.
_MAIN_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")

# The features that Megatron's add_bias_linear switches together.
_BIASES = frozenset({"attention_bias", "mlp_bias"})


def to_fields(
    family: NemoFamily, config: Mapping[str, Any], names: Mapping[str, str], *, vocab_rows: int
) -> dict[str, Any]:
    """Return every field that varies within the family, apart from those of scaled rotary embeddings.

    Args:
        family: The model's family.
        config: The Hugging Face config with explicit sizes and dtype.
        names: Hugging Face key and field of every setting that both have.
        vocab_rows: Rows of the stored embedding, padding included.

    Raises:
        UserError: Megatron cannot express the config.
    """
    for key, wanted in family.layout.fixed.items():
        if config.get(key, wanted) != wanted:
            raise UserError(
                f"Megatron's {family.layout.family} has {key} {wanted}, not {config[key]}, so this model cannot be "
                "converted; keep it in the Hugging Face format."
            )
    stated = {**family.layout.defaults, **config}
    dtype = config.get("torch_dtype") or config["dtype"]
    return {
        **{field: _to_field(field, stated[key]) for key, field in names.items()},
        "vocab_size": vocab_rows,
        "add_bias_linear": _has_biases(family.layout, config),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": Symbol("torch", dtype),
    }


def from_fields(
    family: NemoFamily,
    fields: Mapping[str, Any],
    names: Mapping[str, str],
    path: Path,
    *,
    rope_scaling: Mapping[str, Any] | None,
    vocab_rows: int,
) -> dict[str, Any]:
    """Return the Hugging Face config of the model with even layers that the fields of a config class describe.

    Args:
        family: The model's family.
        fields: The fields and their values.
        names: Hugging Face key and field of every setting that both have.
        path: The file that states the fields, for messages.
        rope_scaling: Hugging Face's ``rope_scaling``.
        vocab_rows: Rows of the stored embedding; the vocabulary size if no field states it.

    Raises:
        UserError: a size is missing or impossible, or Hugging Face's class of the family cannot have a value.
    """
    layout = family.layout
    for field, wanted in {**PLAIN, **family.fixed}.items():
        if fields.get(field, wanted) != wanted:
            raise UserError(
                f"{path} has {field}={fields[field]}, which a {layout.family} in the Hugging Face format cannot have; "
                "such a model is not supported."
            )
    missing = [field for field in dict.fromkeys((*_MAIN_SIZES, *names.values())) if field not in fields]
    if missing:
        raise UserError(
            f"{path} does not state {', '.join(missing)}; use the file that NeMo or Megatron-Bridge wrote."
        )
    _check_numbers(path, fields)
    sizes = {
        "num_query_groups": fields["num_query_groups"] or fields["num_attention_heads"],
        "kv_channels": fields["kv_channels"] or fields["hidden_size"] // fields["num_attention_heads"],
        "vocab_size": fields["vocab_size"] or vocab_rows,
    }
    fields = {**fields, **sizes}
    architecture, model_type = layout.even_class
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **{key: _from_field(field, fields[field]) for key, field in names.items()},
        "rope_theta": float(fields["rotary_base"]),
        "rope_scaling": rope_scaling,
        **layout.fixed,
        # All classes of these families set it to False, unlike Megatron's, of which they are subclasses.
        **{name: fields.get("add_bias_linear", False) for name in sorted(_BIASES.intersection(layout.optional))},
    }


def _has_biases(layout: Layout, config: Mapping[str, Any]) -> bool:
    """Return Megatron's ``add_bias_linear``, which covers all linear layers of a decoder layer."""
    biases = _BIASES.intersection(layout.shape(config).features)
    if biases and biases != _BIASES:
        raise UserError(
            f"This model has only {', '.join(biases)}, but Megatron has biases on all linear layers or on none; "
            "fill the missing ones with zeros."
        )
    return bool(biases)


def _to_field(field: str, value: Any) -> Any:
    """Return the form in such a field of a Hugging Face value.

    A window of w becomes ``[w, 0]``, as in NeMo's own importer, although Megatron counts only the keys before a query
    (w + 1 with its own) and Hugging Face all keys (w): beyond w tokens NeMo attends to one key more.
    """
    return [value, 0] if field == "window_size" and value is not None else value


def _from_field(field: str, value: Any) -> Any:
    """Undo ``_to_field``."""
    return value[0] if field == "window_size" and value is not None else value


_WHOLE_NUMBERS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
)


def _check_numbers(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse sizes of the wrong type or below 1, which a damaged or untrusted file may have.

    Raises:
        UserError: a field has such a value; the message names it.
    """
    for field in _WHOLE_NUMBERS:
        value = fields.get(field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{path} has {field}={value!r}, which is not a size; copy the checkpoint again.")
    if not isinstance(fields["rotary_base"], (int, float)) or isinstance(fields["rotary_base"], bool):
        raise UserError(
            f"{path} has rotary_base={fields['rotary_base']!r}, which is not a number; copy the checkpoint again."
        )
    for field in BY_LAYER:
        sizes = fields.get(field, [])
        if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
            raise UserError(f"{path} has {field}={sizes!r}, which is not a list of sizes; copy the checkpoint again.")
