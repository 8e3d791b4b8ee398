"""The ``context/`` folder of a NeMo checkpoint: the model's configuration, written and read without NeMo.

NeMo describes a model as Fiddle configs (a class and its arguments) in ``io.json``. This module writes that JSON
directly, so that stock NeMo builds the model from it, and reads the JSON of checkpoints that NeMo itself wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.huggingface.config import normal_config, read_config, without_quantization
from nemo_pvs.checkpoints.nemo import fiddle_json
from nemo_pvs.checkpoints.nemo.fiddle_json import Config, Symbol
from nemo_pvs.checkpoints.nemo.nemo_classes import PLAIN, NemoFamily
from nemo_pvs.data.assets import asset_files, copy_asset
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import LayerSizes
from nemo_pvs.system.files import read_json, write_json

_HUGGINGFACE_CONFIG = "huggingface_config.json"
_TOKENIZER = "tokenizer"
_GENERATION = Path("artifacts", "generation_config.json")  # where NeMo's importer writes it

# Fields of our config classes for uneven layers (megatron/uneven.py), in the order of LayerSizes.
_BY_LAYER = ("ffn_hidden_size_by_layer", "num_attention_heads_by_layer", "num_query_groups_by_layer")

# The features that Megatron's add_bias_linear switches together.
_BIASES = frozenset({"attention_bias", "mlp_bias"})


def write_context(folder: Path, config: Mapping[str, Any], assets: Iterable[Path], *, vocab_rows: int) -> None:
    """Write a context that ``nemo.lightning.io.load_context`` reads.

    Args:
        folder: The ``context`` folder to make.
        config: The model's Hugging Face config with explicit sizes and dtype; also written unchanged.
        assets: Tokenizer files and generation config. Without a tokenizer file the model's tokenizer is None.
        vocab_rows: Rows of the stored embedding, padding included.

    Raises:
        UserError: NeMo cannot express the config.
    """
    family = NemoFamily(Layout.for_config(config))
    model_config = _with_layers(family, config, _nemo_config(family, config, vocab_rows))
    folder.mkdir(parents=True)
    tokenizer = None
    for asset in assets:
        if asset.name == _GENERATION.name:
            copy_asset(asset, (folder / _GENERATION).parent)
        else:
            copy_asset(asset, folder / _TOKENIZER)
            tokenizer = Config(
                Symbol("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer"),
                {"pretrained_model_name": _TOKENIZER},
            )
    model = Config(family.model, {"config": model_config, "tokenizer": tokenizer})
    context = Config(Symbol("nemo.lightning.io.pl", "TrainerContext"), {"model": model, "trainer": None, "extra": {}})
    write_json(folder / "io.json", fiddle_json.dump(context))
    write_json(folder / _HUGGINGFACE_CONFIG, dict(config))


def read_context(folder: Path, *, vocab_rows: int, dtype: str) -> dict[str, Any]:
    """Return the Hugging Face config of a checkpoint: the one that ``write_context`` stored, or one built from NeMo's.

    Args:
        folder: The ``context`` folder.
        vocab_rows: Rows of the stored embedding; the vocabulary size if NeMo's config does not state it.
        dtype: Name of the stored dtype, for a config built from NeMo's.

    Raises:
        UserError: there is no usable context, or its model cannot be expressed as a Hugging Face config.
    """
    kept = folder / _HUGGINGFACE_CONFIG
    if kept.is_file():
        return without_quantization(read_config(kept), kept)
    config = _huggingface_config(folder, vocab_rows)
    config["torch_dtype"] = dtype
    if (folder / _GENERATION).is_file():
        generation = read_json(folder / _GENERATION)
        if isinstance(generation, dict):
            config.update({key: generation[key] for key in ("bos_token_id", "eos_token_id") if key in generation})
    return normal_config(config, folder / "io.json")


def context_assets(folder: Path) -> tuple[Path, ...]:
    """Return the tokenizer files and the generation config of a checkpoint."""
    tokenizer = fiddle_json.find(_io_json(folder), "<root>.model.tokenizer")
    name = tokenizer.arguments.get("pretrained_model_name") if tokenizer else None
    assets = {file.name: file for file in asset_files((folder / _GENERATION).parent)}
    if isinstance(name, str) and (folder / name).resolve().is_relative_to(folder.resolve()):
        assets.update({file.name: file for file in asset_files(folder / name)})
    return tuple(assets[name] for name in sorted(assets))


def _io_json(folder: Path) -> Any:
    return read_json(folder / "io.json")


def _nemo_config(family: NemoFamily, config: Mapping[str, Any], vocab_rows: int) -> Config:
    """Return the NeMo config for a Hugging Face config, with every field that varies within the family explicit."""
    name = family.layout.family
    for key, wanted in family.layout.fixed.items():
        if config.get(key, wanted) != wanted:
            raise UserError(
                f"NeMo's {name} has {key} {wanted}, not {config[key]}, so this model cannot be converted; keep it in "
                "the Hugging Face format."
            )
    stated = {**family.layout.defaults, **config}
    dtype = config.get("torch_dtype") or config["dtype"]
    fields = {
        **{field: _to_nemo(field, stated[key]) for key, field in family.fields.items()},
        "vocab_size": vocab_rows,
        "add_bias_linear": _has_biases(family.layout, config),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": Symbol("torch", dtype),
    }
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Config(family.config, fields)
    known = family.rope_scaling
    if known is None or kind != known.kind:
        supported = f"only {known.kind} or no scaling" if known else "only a model without scaling"
        raise UserError(
            f"The rope_scaling of this model is {kind}, which NeMo's {name} lacks; {supported} can be converted."
        )
    missing = [key for key in known.fields if key not in scaling]
    if missing:
        raise UserError(f"The rope_scaling of this model lacks {', '.join(missing)}; restore its config.json.")
    return Config(known.config, {**fields, **{field: scaling[key] for key, field in known.fields.items()}})


def _with_layers(family: NemoFamily, config: Mapping[str, Any], stored: Config) -> Config:
    """Return our class with the sizes of each layer if layers are uneven, else ``stored`` unchanged."""
    layers = family.layout.shape(config).uneven
    if not layers:
        return stored
    by_layer = {name: list(sizes) for name, sizes in zip(_BY_LAYER, zip(*layers, strict=True), strict=True)}
    return Config(family.uneven[stored.symbol], {**stored.arguments, **by_layer})


def _has_biases(layout: Layout, config: Mapping[str, Any]) -> bool:
    """Return Megatron's ``add_bias_linear``, which covers all linear layers of a decoder layer."""
    biases = _BIASES.intersection(layout.shape(config).features)
    if biases and biases != _BIASES:
        raise UserError(
            f"This model has only {', '.join(biases)}, but Megatron has biases on all linear layers or on none; "
            "fill the missing ones with zeros."
        )
    return bool(biases)


def _to_nemo(field: str, value: Any) -> Any:
    """Return the NeMo form of a Hugging Face value.

    A window of w becomes ``[w, 0]``, as in NeMo's own importer, although Megatron counts only the keys before a query
    (w + 1 with its own) and Hugging Face all keys (w): beyond w tokens NeMo attends to one key more.
    """
    return [value, 0] if field == "window_size" and value is not None else value


def _from_nemo(field: str, value: Any) -> Any:
    """Undo ``_to_nemo``."""
    return value[0] if field == "window_size" and value is not None else value


def _huggingface_config(folder: Path, vocab_rows: int) -> dict[str, Any]:
    """Return the Hugging Face config of the model that NeMo describes in ``folder``."""
    path = folder / "io.json"
    stored = fiddle_json.find(_io_json(folder), "<root>.model.config", "<root>.config")
    if stored is None:
        raise UserError(f"{path} does not describe a model; use the checkpoint folder that NeMo wrote.")
    family = NemoFamily.of_class(stored.symbol)
    if family is None:
        raise UserError(
            f"{path} has the config class {stored.symbol.module}.{stored.symbol.name}, which no table in conversions/ "
            f"lists; put the model's Hugging Face config next to it as {_HUGGINGFACE_CONFIG}, or write "
            "conversions/<family>.yaml as conversions/README.md explains."
        )
    fields = {**family.defaults(stored.symbol), **stored.arguments}
    layout = family.layout
    for field, wanted in {**PLAIN, **family.fixed}.items():
        if fields.get(field, wanted) != wanted:
            raise UserError(
                f"{path} has {field}={fields[field]}, which a {layout.family} in the Hugging Face format cannot have; "
                "such a model is not supported."
            )
    required = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
    missing = [field for field in required if field not in fields]
    if missing:
        raise UserError(f"{path} does not state {', '.join(missing)}; use the checkpoint folder that NeMo wrote.")
    _check_numbers(path, fields)
    fields["num_query_groups"] = fields["num_query_groups"] or fields["num_attention_heads"]
    fields["kv_channels"] = fields["kv_channels"] or fields["hidden_size"] // fields["num_attention_heads"]
    fields["vocab_size"] = fields["vocab_size"] or vocab_rows
    architecture, model_type = layout.even_class
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        **{key: _from_nemo(field, fields[field]) for key, field in family.fields.items()},
        "rope_theta": float(fields["rotary_base"]),
        "rope_scaling": _rope_scaling(family, fields),
        **layout.fixed,
        **{name: fields.get("add_bias_linear", False) for name in sorted(_BIASES.intersection(layout.optional))},
    }
    if stored.symbol not in family.uneven.values():
        return config
    sizes = zip(*(fields[name] for name in _BY_LAYER), strict=True)
    return layout.config(layout.shape(config).with_layers(LayerSizes(*layer) for layer in sizes), config)


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
    for field in _BY_LAYER:
        sizes = fields.get(field, [])
        if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
            raise UserError(f"{path} has {field}={sizes!r}, which is not a list of sizes; copy the checkpoint again.")


def _rope_scaling(family: NemoFamily, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``rope_scaling`` in Hugging Face's form; only classes with scaling have its fields."""
    known = family.rope_scaling
    if known is None or not fields.keys() & set(known.fields.values()):
        return None
    return {"rope_type": known.kind, **{key: fields[field] for key, field in known.fields.items()}}
