"""Fingerprints: one name for the same model in any format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from nemo_pvs.checkpoints.read_ahead import ReadAhead
from nemo_pvs.checkpoints.source import Progress, WeightSource, shape_of
from nemo_pvs.checkpoints.tensor_record import TensorRecord, record_of
from nemo_pvs.model.layout import Layout
from nemo_pvs.system.files import sha256_json

# Keys of a family's table that do not change what a model computes.
_NO_FUNCTION = ("initializer_range", "max_position_embeddings")

# Kinds of rope_scaling that do not depend on max_position_embeddings.
_FREE_OF_CONTEXT = ("default", "linear", "llama3")


def fingerprint(source: WeightSource) -> str:
    """Return 32 hexadecimal digits that name a model, the same for its Hugging Face and NeMo copies.

    They cover everything that determines what the model computes: the family, the shape, the constants of its config,
    and the dtype, size and bytes of every tensor. The tensors' checksums come from the manifest or the cache where
    these are known to describe the current files (``StoredTensors``); otherwise the model is read once.
    """
    known = getattr(source, "checksums", None)
    records = known() if known else compute_checksums(source)
    return identity(source.config, records)


def identity(config: Mapping[str, Any], records: Mapping[str, TensorRecord]) -> str:
    """Return the fingerprint of the model with this config and these tensors, hashed with ``tensor_record.HASH``."""
    tensors = {name: asdict(record) for name, record in records.items()}
    return sha256_json({"function": function_of(config), "tensors": tensors})[:32]


def compute_checksums(source: WeightSource, progress: Progress | None = None) -> dict[str, TensorRecord]:
    """Read every tensor of a source and return their checksums."""
    shape = shape_of(source)
    names = Layout.for_config(source.config).parts(shape)
    reads = ReadAhead(source, names)
    records = {}
    done = 0
    for name in names:
        tensor = reads.read(name)
        records[name] = record_of(tensor)
        done += tensor.numel()
        if progress:
            progress(done, shape.parameters)
    return records


def function_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a Hugging Face config that determines what a model computes, with defaults filled in.

    A config that states a default is equivalent to one that leaves it out.
    """
    layout = Layout.for_config(config)
    shape = layout.shape(config)
    function: dict[str, Any] = {"family": layout.family, "shape": shape.to_dict()}
    in_shape = shape.to_config({}).keys()
    for key, default in {**layout.defaults, **layout.fixed}.items():
        if key not in _NO_FUNCTION and key not in in_shape:
            value = config.get(key, default)
            function[key] = float(value) if isinstance(default, float) and value is not None else value
    if config.get("use_sliding_window"):  # Qwen; the constants of a disabled window have no effect
        for key in ("sliding_window", "max_window_layers", "layer_types"):
            function[key] = config.get(key)
    scaling = config.get("rope_scaling")
    if scaling:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            constants = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
            function["rope_scaling"] = {"kind": kind, **{key: _number(value) for key, value in constants.items()}}
        if kind not in _FREE_OF_CONTEXT:
            function["max_position_embeddings"] = config.get("max_position_embeddings")
    return function


def _number(value: Any) -> Any:
    """Return an integer as a float, because rope settings are written either way; anything else as it is."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors of equal size hold the same numbers (of equal dtype: the same bytes)."""
    if first.dtype == second.dtype:
        return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    return torch.equal(first.double(), second.double())
