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
from nemo_pvs.checkpoints.nemo.model_fields import BY_LAYER, from_fields, to_fields
from nemo_pvs.checkpoints.nemo.nemo_classes import NemoFamily
from nemo_pvs.data.assets import asset_files, copy_asset, tokenizer_among
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import LayerSizes
from nemo_pvs.system.files import read_json, write_json

HUGGINGFACE_CONFIG = "huggingface_config.json"
"""The file in which we store the model's Hugging Face config in a checkpoint of another format."""

_TOKENIZER = "tokenizer"
_GENERATION = Path("artifacts", "generation_config.json")  # where NeMo's importer writes it


def check_for_nemo(config: Mapping[str, Any], *, vocab_rows: int) -> None:
    """Refuse a model that NeMo cannot express, before any weight is written.

    Args:
        config: The model's Hugging Face config with explicit sizes and dtype.
        vocab_rows: Rows of the embedding, padding included.

    Raises:
        UserError: naming the setting.
    """
    _model_config(config, vocab_rows)


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
    model_config = _model_config(config, vocab_rows)
    folder.mkdir(parents=True)
    assets, tokenizer = tuple(assets), None
    for asset in assets:
        copy_asset(asset, (folder / _GENERATION).parent if asset.name == _GENERATION.name else folder / _TOKENIZER)
    if tokenizer_among(assets):
        tokenizer = Config(
            Symbol("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer"),
            {"pretrained_model_name": _TOKENIZER},
        )
    family = NemoFamily(Layout.for_config(config))
    model = Config(family.model, {"config": model_config, "tokenizer": tokenizer})
    context = Config(Symbol("nemo.lightning.io.pl", "TrainerContext"), {"model": model, "trainer": None, "extra": {}})
    write_json(folder / "io.json", fiddle_json.dump(context))
    write_json(folder / HUGGINGFACE_CONFIG, dict(config))


def read_context(folder: Path, *, vocab_rows: int, dtype: str) -> dict[str, Any]:
    """Return the Hugging Face config of a checkpoint: the one that ``write_context`` stored, or one built from NeMo's.

    Args:
        folder: The ``context`` folder.
        vocab_rows: Rows of the stored embedding; the vocabulary size if NeMo's config does not state it.
        dtype: Name of the stored dtype, for a config built from NeMo's.

    Raises:
        UserError: there is no usable context, or its model cannot be expressed as a Hugging Face config.
    """
    kept = folder / HUGGINGFACE_CONFIG
    if kept.is_file():
        return without_quantization(read_config(kept), kept)
    config = _huggingface_config(folder, vocab_rows)
    config["torch_dtype"] = dtype
    if (folder / _GENERATION).is_file():
        generation = read_json(folder / _GENERATION)
        if isinstance(generation, dict):
            config.update({key: generation[key] for key in ("bos_token_id", "eos_token_id") if key in generation})
    return normal_config(config, folder / "io.json")


def tokenizer_elsewhere(folder: Path) -> str | None:
    """Return the name or path of the tokenizer of a model that NeMo trained, if it is not in the checkpoint."""
    tokenizer = fiddle_json.find(_io_json(folder), "<root>.model.tokenizer")
    names = [value for value in tokenizer.arguments.values() if isinstance(value, str)] if tokenizer else []
    return names[0] if names and not tokenizer_among(context_assets(folder)) else None


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


def _model_config(config: Mapping[str, Any], vocab_rows: int) -> Config:
    family = NemoFamily(Layout.for_config(config))
    return _with_layers(family, config, _nemo_config(family, config, vocab_rows))


def _nemo_config(family: NemoFamily, config: Mapping[str, Any], vocab_rows: int) -> Config:
    """Return the NeMo config for a Hugging Face config, with every field that varies within the family explicit."""
    fields = to_fields(family, config, family.fields, vocab_rows=vocab_rows)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Config(family.config, fields)
    known = family.rope_scaling
    if known is None or kind != known.kind:
        supported = f"only {known.kind} or no scaling" if known else "only a model without scaling"
        raise UserError(
            f"The rope_scaling of this model is {kind}, which NeMo's {family.layout.family} lacks; {supported} can be "
            "converted."
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
    by_layer = {name: list(sizes) for name, sizes in zip(BY_LAYER, zip(*layers, strict=True), strict=True)}
    return Config(family.uneven[stored.symbol], {**stored.arguments, **by_layer})


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
            f"lists; put the model's Hugging Face config next to it as {HUGGINGFACE_CONFIG}, or write "
            "conversions/<family>.yaml as conversions/README.md explains."
        )
    fields = {**family.defaults(stored.symbol), **stored.arguments}
    config = from_fields(
        family, fields, family.fields, path, rope_scaling=_rope_scaling(family, fields), vocab_rows=vocab_rows
    )
    if stored.symbol not in family.uneven.values():
        return config
    layout = family.layout
    columns: list[Any] = [fields.get(name) for name in BY_LAYER]
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
        raise UserError(f"{path} does not have {', '.join(BY_LAYER)} of every layer; use the checkpoint NeMo wrote.")
    sizes = [LayerSizes(*layer) for layer in zip(*columns, strict=True)]
    return layout.config(layout.shape(config).with_layers(sizes), config)


def _rope_scaling(family: NemoFamily, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``rope_scaling`` in Hugging Face's form; only classes with scaling have its fields."""
    known = family.rope_scaling
    if known is None or not fields.keys() & set(known.fields.values()):
        return None
    return {"rope_type": known.kind, **{key: fields[field] for key, field in known.fields.items()}}
