"""WeightSource: what every checkpoint format and every transform of one looks like to its reader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_pvs.checkpoints.read_ahead import ReadAhead
from nemo_pvs.checkpoints.tensor_record import TensorRecord, record_of
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.system.files import sha256_json

# Keys of a family's table that do not change what a model computes.
_NO_FUNCTION = ("initializer_range", "max_position_embeddings")

# Kinds of rope_scaling that do not depend on max_position_embeddings.
_FREE_OF_CONTEXT = ("default", "linear", "llama3")


Progress = Callable[[int, int], None]
"""Called with (done, total), both in parameters."""


class WeightSource(Protocol):
    """A model whose tensors are read one at a time under their Hugging Face names.

    Pruning wraps one source in another, and writers pull from whatever they are given, so no step holds a model.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face ``config.json`` of the model."""

    @property
    def assets(self) -> tuple[Path, ...]:
        """Files that travel along: tokenizer, chat template, generation config."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in the stored dtype; ``name`` is complete (``model.layers.3.mlp.up_proj.weight``)."""


def shape_of(source: WeightSource) -> Shape:
    """Return the Shape of a source's model."""
    return Layout.for_config(source.config).shape(source.config)


class Fingerprint(str):
    """The name of a model by its content, which recognises the name that earlier versions gave the same model."""

    earlier: Callable[[], str]
    """Computes that earlier name; it takes reading three layers."""

    def __new__(cls, value: str, earlier: Callable[[], str]) -> Fingerprint:
        """Return ``value`` with the function that computes the earlier name."""
        made = super().__new__(cls, value)
        made.earlier = earlier
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Copy and pickle as a plain string."""
        return str, (str(self),)

    def names(self, stated: object) -> bool:
        """Return whether ``stated``, of any version, is the fingerprint of this model."""
        return self == stated or (_is_earlier(stated) and self.earlier() == stated)


def fingerprint(source: WeightSource) -> Fingerprint:
    """Return 32 hexadecimal digits that name the model whatever its format: the same for HF and NeMo copies of it.

    They cover all that decides what the model computes: the family, the shape, the constants of its config, and dtype,
    size and bytes of every tensor. The tensors' checksums are taken from the manifest or the cache where one of them
    is known to be of these very files (``StoredTensors``); otherwise the model is read once.
    """
    known = getattr(source, "checksums", None)
    records = known() if known else compute_checksums(source)
    return identity(source.config, records, earlier=lambda: earlier_fingerprint(source))


def identity(
    config: Mapping[str, Any], records: Mapping[str, TensorRecord], *, earlier: Callable[[], str]
) -> Fingerprint:
    """Return the fingerprint of the model with this config and these tensors, recorded by ``tensor_record.HASH``."""
    tensors = {name: asdict(record) for name, record in records.items()}
    return Fingerprint(sha256_json({"function": function_of(config), "tensors": tensors})[:32], earlier)


def compute_checksums(source: WeightSource, progress: Progress | None = None) -> dict[str, TensorRecord]:
    """Read every tensor of a source, and return their checksums."""
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
    """Return what a Hugging Face config says about the function that a model computes, defaults filled in.

    Two configs of which one states a default that the other leaves out are the same.
    """
    layout = Layout.for_config(config)
    shape = layout.shape(config)
    function: dict[str, Any] = {"family": layout.family, "shape": shape.to_dict()}
    in_shape = shape.to_config({}).keys()
    for key, default in {**layout.defaults, **layout.fixed}.items():
        if key not in _NO_FUNCTION and key not in in_shape:
            value = config.get(key, default)
            function[key] = float(value) if isinstance(default, float) and value is not None else value
    if config.get("use_sliding_window"):  # of Qwen; the constants of a switched-off window decide nothing
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


def earlier_fingerprint(source: WeightSource) -> str:
    """Return the fingerprint that earlier versions gave a model: 64 hexadecimal digits.

    It covers the shape, every vector, and the matrices of the first, middle and last decoder layers. Run folders,
    scores and plans that were made with it are recognised by it.
    """
    shape = shape_of(source)
    digest = hashlib.sha256(sha256_json(shape.to_dict()).encode())
    sampled = {0, shape.layers // 2, shape.layers - 1}
    for name, (part, entry) in Layout.for_config(source.config).parts(shape).items():
        if len(part.axes) == 1 or entry.layer in sampled:
            tensor = source.read(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_earlier(stated: object) -> bool:
    return isinstance(stated, str) and len(stated) == hashlib.sha256().digest_size * 2


def _number(value: Any) -> Any:
    """Return an integer as the float that it equals: rope settings have both."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one size hold the same numbers, NaN being the same as NaN."""
    if one.dtype == other.dtype:
        return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    return torch.equal(one.double(), other.double())
