"""Plan: which layers, channels, heads and tokens a pruned model keeps; small, readable, made without a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.pruning.input_means import AXES, FEATURES, InputMeans
from nemo_pvs.system.files import read_json, sha256_json, write_json

Indices = tuple[int, ...]

_MEANS = ".input_means"
"""Suffix of the file with a plan's vectors."""


@dataclass(frozen=True)
class Plan:
    """What a pruned model keeps of its parent. Indices count from 0 in the parent, in the parent's order."""

    method: str
    """For example minitron-width or minitron-depth."""
    parent: Shape
    target: Shape
    keep_layers: Indices
    keep_hidden: Indices = field(repr=False)
    """One set for the whole model, because all layers share the residual stream."""
    keep_ffn: tuple[Indices, ...] = field(repr=False)
    """FFN channels of each kept layer, in the order of ``keep_layers``."""
    keep_kv_groups: tuple[Indices, ...] = field(repr=False)
    """KV groups of each kept layer."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the plan was made from: ``model_fingerprint``, hashes of scores or tokens, and settings."""
    keep_vocab: Indices | None = field(default=None, repr=False)
    """Tokens, which are renumbered in their order; None keeps the vocabulary and the tokenizer as they are."""
    input_means: InputMeans | None = field(default=None, repr=False)
    """Means of the removed inputs of ``o_proj`` and ``down_proj``, if biases compensate for them. The pruned model
    then has attention_bias and mlp_bias (Llama's own switches); other biases that these add are zero."""
    keep_heads: tuple[Indices, ...] = field(default=(), repr=False)
    """Query heads of each kept layer, the same number in each of its kept groups; if empty, all heads of these."""
    merged_heads: tuple[tuple[tuple[int, int], ...], ...] = field(default=(), repr=False)
    """For each kept layer, pairs of a kept head i and a removed one j of its group: the rows of ``q_proj`` become
    ``head_i + (head_i - head_j)`` (``structured.width.plan_width``). Empty if nothing is merged."""

    def __post_init__(self) -> None:
        """Raise UserError unless the indices are in order and add up to the target."""
        rows_by_name: dict[str, tuple[Any, ...]] = {"keep_ffn": self.keep_ffn, "keep_kv_groups": self.keep_kv_groups}
        if self.keep_heads:
            rows_by_name["keep_heads"] = self.keep_heads
        if self.merged_heads:
            rows_by_name["merged_heads"] = self.merged_heads
        for name, rows in rows_by_name.items():
            if len(rows) != len(self.keep_layers):
                raise UserError(f"The plan's {name} has {len(rows)} layers, but {len(self.keep_layers)} are kept.")
        _check("keep_layers", self.keep_layers, self.parent.layers)
        _check("keep_hidden", self.keep_hidden, self.parent.hidden)
        sizes = []
        for index, layer in enumerate(self.keep_layers):
            parent, ffn, groups = self.parent.at(layer), self.keep_ffn[index], self.keep_kv_groups[index]
            _check(f"keep_ffn of layer {layer}", ffn, parent.ffn)
            _check(f"keep_kv_groups of layer {layer}", groups, parent.kv_groups)
            heads = self.heads(index)
            _check(f"keep_heads of layer {layer}", heads, parent.heads)
            _check_groups_of_heads(layer, heads, groups, parent.heads_per_group)
            if self.merged_heads:
                _check_merged(layer, self.merged_heads[index], heads, parent)
            sizes.append(LayerSizes(len(ffn), len(heads), len(groups)))
        kept = self.parent.replace(hidden=len(self.keep_hidden)).with_layers(sizes)
        if self.input_means is not None:
            kept = kept.replace(features=tuple(sorted({*kept.features, *FEATURES})))
            self._check_input_means(self.input_means)
        if self.keep_vocab is not None:
            _check("keep_vocab", self.keep_vocab, self.parent.vocab)
            kept = kept.replace(vocab=len(self.keep_vocab))
        if kept != self.target:
            raise UserError(
                f"The plan keeps [{kept}], but its target is [{self.target}]; it removes layers, hidden and FFN "
                "channels, KV groups, query heads and tokens, and leaves head_dim alone."
            )

    def _check_input_means(self, means: InputMeans) -> None:
        for axis in AXES:
            removed = [len(self.removed(axis, layer)) for layer in range(len(self.keep_layers))]
            if means.counts(axis) != removed:
                raise UserError(
                    f"The plan's input means do not fit the channels that it removes ({axis}); plan again."
                )

    def heads(self, layer: int) -> Indices:
        """Return the query heads that are kept of a layer, given its index in the pruned model."""
        if self.keep_heads:
            return self.keep_heads[layer]
        per_group = self.parent.at(self.keep_layers[layer]).heads_per_group
        return _channels(self.keep_kv_groups[layer], per_group)

    def kept(self, axis: str, layer: int | None) -> Indices:
        """Return the positions kept along a Layout axis.

        Args:
            axis: hidden, ffn, query, key, head_dim or vocab.
            layer: Index of the layer in the pruned model; None for a tensor outside the layers.
        """
        if axis == "hidden":
            return self.keep_hidden
        if axis == "vocab" and self.keep_vocab is not None:
            return self.keep_vocab
        if layer is None or axis in {"vocab", "head_dim"}:
            return tuple(range(self.parent.axis(axis)))
        if axis == "ffn":
            return self.keep_ffn[layer]
        return _channels(self.heads(layer) if axis == "query" else self.keep_kv_groups[layer], self.parent.head_dim)

    def removed(self, axis: str, layer: int) -> Indices:
        """Return the positions removed along a Layout axis (query or ffn) of the parent's layer kept as ``layer``."""
        kept = set(self.kept(axis, layer))
        size = self.parent.at(self.keep_layers[layer]).axis(axis)
        return tuple(position for position in range(size) if position not in kept)

    def kept_parameters(self, layout: Layout) -> int:
        """Count the pruned model's parameters tensor by tensor; must equal ``target.parameters``."""
        count = 0
        for part, entry in layout.parts(self.target).values():
            count += math.prod(len(self.kept(axis, entry.layer)) for axis in part.axes)
        return count

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values; indices become ranges, one line per layer, so that plans can be diffed."""

        def by_layer(rows: Iterable[Indices]) -> dict[str, str]:
            return {str(layer): format_ranges(row) for layer, row in zip(self.keep_layers, rows, strict=True)}

        return {
            "method": self.method,
            "parent": self.parent.to_dict(),
            "target": self.target.to_dict(),
            "keep_layers": format_ranges(self.keep_layers),
            "keep_hidden": format_ranges(self.keep_hidden),
            "keep_ffn": by_layer(self.keep_ffn),
            "keep_kv_groups": by_layer(self.keep_kv_groups),
            **({} if self.keep_vocab is None else {"keep_vocab": format_ranges(self.keep_vocab)}),
            **({"keep_heads": by_layer(self.keep_heads)} if self.keep_heads else {}),
            **({"merged_heads": self._merged_by_layer()} if self.merged_heads else {}),
            "provenance": dict(self.provenance),
            **({"input_means": self.input_means.content_hash} if self.input_means else {}),
        }

    def _merged_by_layer(self) -> dict[str, str]:
        rows = {}
        for layer, pairs in zip(self.keep_layers, self.merged_heads, strict=True):
            rows[str(layer)] = ",".join(f"{kept}:{removed}" for kept, removed in pairs)
        return rows

    @classmethod
    def from_json(cls, values: Mapping[str, Any], input_means: InputMeans | None = None) -> Plan:
        """Rebuild a plan from ``to_json`` and from the vectors, of which the JSON holds only the hash.

        Raises:
            UserError: something is missing, malformed or contradictory.
        """
        try:
            if values.get("input_means") != (input_means and input_means.content_hash):
                raise UserError("The plan's input means do not have the hash that it records; plan again.")
            layers = parse_ranges(values["keep_layers"])
            for name in ("keep_ffn", "keep_kv_groups", "keep_heads", "merged_heads"):
                if name in values and [int(layer) for layer in values[name]] != list(layers):
                    raise UserError(f"The plan's {name} must name exactly the layers of keep_layers, in their order.")
            return cls(
                method=str(values["method"]),
                parent=Shape.from_dict(values["parent"]),
                target=Shape.from_dict(values["target"]),
                keep_layers=layers,
                keep_hidden=parse_ranges(values["keep_hidden"]),
                keep_ffn=tuple(parse_ranges(row) for row in values["keep_ffn"].values()),
                keep_kv_groups=tuple(parse_ranges(row) for row in values["keep_kv_groups"].values()),
                keep_vocab=parse_ranges(values["keep_vocab"]) if "keep_vocab" in values else None,
                provenance=dict(values["provenance"]),
                input_means=input_means,
                keep_heads=tuple(parse_ranges(row) for row in values.get("keep_heads", {}).values()),
                merged_heads=tuple(_parse_pairs(row) for row in values.get("merged_heads", {}).values()),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"This is not a plan of nemo_pvs ({type(error).__name__}: {error}); plan again.") from None

    def save(self, path: Path) -> None:
        """Write the plan as a JSON file and, if it has any, its input means next to it as ``<name>.input_means``.

        The latter is a safetensors file under another suffix, because model loaders take every ``.safetensors`` file
        in a folder for weights.
        """
        if self.input_means is not None:
            self.input_means.save(path.with_suffix(_MEANS))
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan that ``save`` wrote.

        Raises:
            UserError: a file is missing or is not a valid plan.
        """
        values = read_json(path)
        named = values.get("input_means") if isinstance(values, dict) else None
        return cls.from_json(values, InputMeans.load(path.with_suffix(_MEANS), named) if named else None)

    @property
    def plan_hash(self) -> str:
        """A SHA-256 of the whole plan, provenance included."""
        return sha256_json(self.to_json())


def whole_layers(shape: Shape, layers: Sequence[int]) -> dict[str, Any]:
    """Return the ``keep_*`` arguments of a Plan that keeps these layers and everything in them."""
    kept = [shape.at(layer) for layer in layers]
    return {
        "keep_layers": tuple(layers),
        "keep_hidden": tuple(range(shape.hidden)),
        "keep_ffn": tuple(tuple(range(layer.ffn)) for layer in kept),
        "keep_kv_groups": tuple(tuple(range(layer.kv_groups)) for layer in kept),
    }


def format_ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as ranges: ``(0, 1, 2, 3, 5)`` becomes ``0-3,5``."""
    runs = ([index for _, index in run] for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]))
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def parse_ranges(text: str) -> Indices:
    """Undo ``format_ranges``.

    Raises:
        ValueError: the text is not a list of ranges.
    """
    indices: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    return tuple(indices)


def _channels(units: Indices, size: int) -> Indices:
    """Return the positions of units that are runs of ``size`` contiguous positions, such as the channels of heads."""
    return tuple(unit * size + position for unit in units for position in range(size))


def _check_groups_of_heads(layer: int, heads: Indices, groups: Indices, heads_per_group: int) -> None:
    """Raise UserError unless each of these KV groups keeps the same number of query heads, and no other group any."""
    counts = Counter(head // heads_per_group for head in heads)
    if counts.keys() != set(groups) or len(set(counts.values())) > 1:
        raise UserError(
            f"The plan's keep_heads of layer {layer} must name the same number of heads for every kept KV group, and "
            "none for the others."
        )


def _check_merged(layer: int, pairs: Sequence[tuple[int, int]], heads: Indices, parent: Shape) -> None:
    """Raise UserError unless each pair is a kept and a removed head of one KV group, and no head is in two pairs."""
    named = [head for pair in pairs for head in pair]
    for kept, removed in pairs:
        same_group = kept // parent.heads_per_group == removed // parent.heads_per_group
        if kept not in heads or removed in heads or not 0 <= removed < parent.heads or not same_group:
            raise UserError(
                f"The plan's merged_heads of layer {layer} must be pairs of a kept and a removed head of one group."
            )
    if len(set(named)) < len(named):
        raise UserError(f"The plan's merged_heads of layer {layer} must not name a head twice.")


def _parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Return pairs written as ``2:3,6:7``; raise ValueError if they are not."""
    pairs = []
    for piece in text.split(",") if text else ():
        kept, removed = piece.split(":")
        pairs.append((int(kept), int(removed)))
    return tuple(pairs)


def _check(name: str, indices: Indices, size: int) -> None:
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= size:
        raise UserError(
            f"The plan's {name} must be ascending, without duplicates, not empty, and within 0-{size - 1}."
        )
