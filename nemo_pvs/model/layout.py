"""Layout: the table of a model family's weights, and how they are fused into Megatron's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorPart:
    """One Hugging Face tensor inside a Megatron tensor."""

    name: str
    """Full Hugging Face name (``model.layers.3.mlp.up_proj.weight``)."""
    axes: tuple[str, ...]
    """Axis names, outermost first; ``Shape.axis`` gives their lengths."""
    layer: int | None
    """Index of the decoder layer, from 0; None for a tensor that exists once."""

    def size(self, shape: Shape) -> tuple[int, ...]:
        """Return the tensor's size in a model of this shape."""
        return tuple(shape.at(self.layer).axis(axis) for axis in self.axes)


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor of one layer (or of the model) and the Hugging Face tensors fused into it."""

    megatron: str
    """Megatron name without prefix (``mlp.linear_fc1.weight``)."""
    layer: int | None
    """Index of the decoder layer, from 0; None for a tensor that exists once."""
    parts: tuple[TensorPart, ...]
    fuse: str
    """plain, qkv or gate_up (conversions/README.md)."""
    tensor_parallel_axis: int | None

    def size(self, shape: Shape) -> tuple[int, ...]:
        """Return the size of the fused tensor; parts are stacked along the first axis."""
        sizes = [part.size(shape) for part in self.parts]
        return (sum(size[0] for size in sizes), *sizes[0][1:])

    def join(self, tensors: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        """Fuse the parts, in the order of ``parts``, into the Megatron tensor."""
        import torch

        if self.fuse == "plain":
            return tensors[0]
        if self.fuse == "gate_up":
            return torch.cat(list(tensors))
        kv_groups = shape.at(self.layer).kv_groups
        groups = [tensor.unflatten(0, (kv_groups, -1)) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def join_rank(self, tensors: Sequence[torch.Tensor], shape: Shape, rank: int, ranks: int) -> torch.Tensor:
        """Fuse a tensor-parallel rank's slices of the parts, whose sharded axis is a multiple of ``ranks``.

        Each part is sliced before they are fused: a rank's gate and up rows are not adjacent in the whole tensor.
        """
        if self.tensor_parallel_axis is None or ranks == 1:
            return self.join(tensors, shape)
        slices = [part.chunk(ranks, dim=self.tensor_parallel_axis)[rank] for part in tensors]
        layer = shape.at(self.layer)
        return self.join(slices, layer.replace(kv_groups=layer.kv_groups // ranks) if self.fuse == "qkv" else shape)

    def split(self, fused: torch.Tensor, shape: Shape) -> list[torch.Tensor]:
        """Undo ``join``: return the parts of a Megatron tensor, as views where the fusion allows."""
        if self.fuse == "plain":
            return [fused]
        if self.fuse == "gate_up":
            return list(fused.chunk(2))
        kv_groups = shape.at(self.layer).kv_groups
        rows = [part.size(shape)[0] // kv_groups for part in self.parts]
        groups = fused.unflatten(0, (kv_groups, -1)).split(rows, dim=1)
        return [group.flatten(0, 1) for group in groups]


@dataclass(frozen=True)
class Layout:
    """The weights of one model family (``conversions/<family>.yaml``)."""

    family: str
    table: Mapping[str, Any]

    @property
    def architectures(self) -> tuple[str, ...]:
        """The Hugging Face classes that the table describes, including the one for uneven layers."""
        return tuple(names[0] for names in (self.even_class, self.uneven_class) if names)

    @property
    def even_class(self) -> tuple[str, str]:
        """Architecture and model_type of the stock class in ``transformers``."""
        return self.table["architecture"], self.table["model_type"]

    @property
    def uneven_class(self) -> tuple[str, str] | None:
        """Architecture and model_type of our class for uneven layers, if the family has one."""
        names = self.table.get("uneven")
        return (names["architecture"], names["model_type"]) if names else None

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The values that ``transformers`` uses for keys missing from config.json."""
        return self.table["defaults"]

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Keys of config.json and the only values with which NeMo computes the same function."""
        return self.table["fixed"]

    @property
    def optional(self) -> tuple[str, ...]:
        """Features that only some models of the family have."""
        return tuple(self.table.get("optional", ()))

    def loading_note(self, shape: Shape) -> str | None:
        """Return a sentence about what Transformers 5 refuses to load, or None; version 4 loads it."""
        if self.family != "llama" or shape.uneven or shape.hidden % shape.heads == 0:
            return None
        return (
            f"Transformers 5 refuses a Llama whose {shape.heads} heads do not divide its hidden size of "
            f"{shape.hidden:,}, while Transformers 4 loads it; if both should load it, choose sizes that divide."
        )

    @classmethod
    def for_config(cls, config: Mapping[str, Any]) -> Layout:
        """Return the layout for a Hugging Face ``config.json``.

        Raises:
            UserError: no table in ``conversions/`` names the config's architecture.
        """
        wanted = config.get("architectures") or []
        for layout in layouts():
            if set(wanted) & set(layout.architectures):
                return layout
        known = ", ".join(name for layout in layouts() for name in layout.architectures)
        model_type = config.get("model_type")
        if not wanted and not model_type:
            raise UserError(f"config.json names neither architectures nor model_type; add them (known: {known}).")
        raise UserError(
            f"No weight table for {f'architecture {wanted[0]}' if wanted else f'model_type {model_type}'} "
            f"(known: {known}); to add the family, write conversions/{model_type or '<family>'}.yaml as "
            "conversions/README.md explains."
        )

    def shape(self, config: Mapping[str, Any]) -> Shape:
        """Return the Shape described by a Hugging Face ``config.json`` of this family.

        Raises:
            UserError: a size is missing or impossible.
        """
        return Shape.from_config({**self.defaults, **config}, self.table.get("always", ()))

    def config(self, shape: Shape, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a Hugging Face ``config`` with the sizes of ``shape`` and the class that loads them.

        Raises:
            UserError: the family cannot have the biases of the shape.
        """
        self._require_features(shape)
        architecture, model_type = (shape.uneven and self.uneven_class) or self.even_class
        names = {"architectures": [architecture], "model_type": model_type}
        return {**shape.to_config(config), **_layer_types(shape, config), **names}

    def require_class(self, shape: Shape, *, uneven: bool = False) -> None:
        """Refuse a shape that no class can load, as some families have none for uneven layers.

        Args:
            shape: The shape of a model, or the one that pruning is expected to leave.
            uneven: Whether scores will decide the sizes of each layer.

        Raises:
            UserError: the family cannot have its biases, or uneven layers.
        """
        self._require_features(shape)
        if (shape.uneven or uneven) and self.uneven_class is None:
            raise UserError(
                f"The family {self.family} has no class for uneven layers; prune all layers alike (structure UL-MM, "
                "where the method has it), or pad them with zeros (--uneven pad of pvs prune and pvs convert)."
            )

    def _require_features(self, shape: Shape) -> None:
        possible = {*self.table.get("always", ()), *self.optional}
        if not possible.issuperset(shape.features):
            raise UserError(
                f"The family {self.family} has no {', '.join(sorted({*shape.features} - possible))}; "
                "use a method that adds no biases."
            )

    def entries(self, shape: Shape) -> Iterator[Entry]:
        """Yield every Megatron tensor of a model of this shape, embedding first, then layer by layer."""
        (head, *tail), layer_rows = (self._rows(part, shape) for part in ("model", "layer"))
        yield self._entry(head, None)
        for layer in range(shape.layers):
            for row in layer_rows:
                yield self._entry(row, layer)
        for row in tail:
            yield self._entry(row, None)

    def _rows(self, part: str, shape: Shape) -> list[Mapping[str, Any]]:
        present = {None, *shape.features}
        if not shape.tied:
            present.add("untied")
        return [row for row in self.table[part] if row.get("only_when") in present]

    def parts(self, shape: Shape) -> dict[str, tuple[TensorPart, Entry]]:
        """Return every Hugging Face tensor of a model of this shape by name, with the entry that holds it."""
        return {part.name: (part, entry) for entry in self.entries(shape) for part in entry.parts}

    @staticmethod
    def _entry(row: Mapping[str, Any], layer: int | None) -> Entry:
        prefix = "" if layer is None else f"model.layers.{layer}."
        return Entry(
            megatron=row["megatron"],
            layer=layer,
            parts=tuple(TensorPart(prefix + name, tuple(axes), layer) for name, axes in row["huggingface"].items()),
            fuse=row.get("fuse", "plain"),
            tensor_parallel_axis=row.get("tensor_parallel_axis"),
        )


def _layer_types(shape: Shape, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return ``layer_types`` for a changed number of layers; transformers requires one entry per layer."""
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if layers == shape.layers:
        return {}
    # Without layer_types, layers from max_window_layers onwards have a window.
    mixed = config.get("use_sliding_window") and not kinds and 0 < config.get("max_window_layers", 28) < (layers or 0)
    if mixed or len(set(kinds or ())) > 1:
        raise UserError(
            "The layers of this model have several kinds of attention (full_attention, sliding_attention), so their "
            "number cannot be changed; prune the width instead."
        )
    return {"layer_types": kinds[:1] * shape.layers} if kinds else {}


@cache
def layouts() -> tuple[Layout, ...]:
    """Return the layout of every family in ``conversions/``."""
    files = sorted(
        (file for file in resources.files("nemo_pvs.conversions").iterdir() if file.name.endswith(".yaml")),
        key=lambda file: file.name,
    )
    tables = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    return tuple(Layout(table["family"], table) for table in tables)
