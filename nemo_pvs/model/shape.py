"""Shape: the sizes of a Llama-family model, and what follows from them: counts, FLOPs, legal parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from nemo_pvs.errors import UserError

# The name of each size in a Hugging Face config.json.
_CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "tied": "tie_word_embeddings",
}
_LAYER_SHAPES = "layer_shapes"
"""The key for the sizes of uneven layers in config.json: a list with a dictionary of three sizes per layer."""

# Transformer Engine multiplies matrices in FP8 only if both dimensions are multiples of 16.
_FP8_MULTIPLE = 16

# Features that config.json states under their own names; a family's table lists the others.
_CONFIG_FEATURES = ("attention_bias", "mlp_bias")


class LayerSizes(NamedTuple):
    """The sizes that may differ from layer to layer."""

    ffn: int
    heads: int
    kv_groups: int


@dataclass(frozen=True)
class Shape:
    """The sizes of one model. Counts, FLOPs and legal parallelism are computed here and nowhere else.

    If layers are uneven, ``ffn``, ``heads`` and ``kv_groups`` are those of the smallest even model that all layers
    fit into, and ``uneven`` has the sizes of each layer; ``at`` returns the sizes of one.
    """

    layers: int
    """Decoder layers (L)."""
    hidden: int
    """Width of the residual stream (d)."""
    ffn: int
    """Intermediate size of the gated MLP (f)."""
    heads: int
    """Query heads (H)."""
    kv_groups: int
    """Key/value heads (G); each serves ``heads / kv_groups`` query heads."""
    head_dim: int
    """Channels per head (h); ``heads * head_dim`` need not equal ``hidden``."""
    vocab: int
    """Rows of the embedding (V), without padding."""
    tied: bool
    """Whether the output head shares the embedding's weights."""
    features: tuple[str, ...] = ()
    """Vectors that not every Llama has, in alphabetical order: attention_bias (q, k, v, o), qkv_bias (q, k, v),
    mlp_bias (gate, up, down) and qk_norm (a weight per channel of a head, for queries and for keys)."""
    uneven: tuple[LayerSizes, ...] = ()
    """Sizes layer by layer; empty if all layers have the same sizes."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in _CONFIG_KEYS and field.name != "tied":
                _check_size(field.name, getattr(self, field.name))
        for layer in self.uneven:
            for name, value in layer._asdict().items():
                _check_size(name, value)
        for sizes in (self._sizes, *self.uneven):
            if sizes.heads % sizes.kv_groups:
                raise UserError(
                    f"{sizes.heads} query heads cannot be shared by {sizes.kv_groups} KV groups; "
                    "choose a number of heads that the groups divide."
                )
        if self.uneven and (len(self.uneven), _bounds(self.uneven)) != (self.layers, self._sizes):
            raise UserError(
                f"The sizes of {len(self.uneven)} uneven layers do not fit a model of {self.layers} layers with ffn "
                f"{self.ffn} and {self.heads} heads in {self.kv_groups} KV groups; give their common bounds."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], features: Iterable[str] = ()) -> Shape:
        """Read the sizes from a Hugging Face ``config.json``.

        Args:
            config: The parsed file.
            features: Features that every model of the family has; ``Layout.shape`` passes them.

        Raises:
            UserError: a size is missing or impossible.
        """
        values: dict[str, Any] = {
            "num_key_value_heads": config.get("num_attention_heads"),
            "tie_word_embeddings": False,
            **{key: value for key, value in config.items() if value is not None},
        }
        if "head_dim" not in values and {"hidden_size", "num_attention_heads"} <= values.keys():
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        missing = [key for key in _CONFIG_KEYS.values() if values.get(key) is None]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}; is this a Llama-family model?")
        stated = {name for name in _CONFIG_FEATURES if config.get(name)}
        shape = cls(
            **{name: values[key] for name, key in _CONFIG_KEYS.items()},
            features=tuple(sorted({*features, *stated})),
        )
        if _LAYER_SHAPES not in values:
            return shape
        try:
            sizes = []
            for layer in values[_LAYER_SHAPES]:
                sizes.append(LayerSizes(*(layer[_CONFIG_KEYS[name]] for name in LayerSizes._fields)))
        except (TypeError, KeyError) as error:
            raise UserError(f"{_LAYER_SHAPES} in config.json lacks {error}; restore the file.") from None
        return shape.with_layers(sizes)

    def to_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a Hugging Face ``config`` with this shape's sizes, including an explicit ``head_dim``."""
        stated = {name: name in self.features for name in _CONFIG_FEATURES if name in {*config, *self.features}}
        sizes = {key: getattr(self, name) for name, key in _CONFIG_KEYS.items()}
        layers = [{_CONFIG_KEYS[name]: size for name, size in sizes._asdict().items()} for sizes in self.uneven]
        kept = {key: value for key, value in config.items() if key != _LAYER_SHAPES}
        return {**kept, **sizes, **stated, **({_LAYER_SHAPES: layers} if layers else {})}

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain data; ``features`` and ``uneven`` are left out if empty."""
        values = {name: value for name, value in asdict(self).items() if value != ()}
        if self.uneven:
            values["uneven"] = [sizes._asdict() for sizes in self.uneven]
        if self.features:
            values["features"] = list(self.features)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Shape:
        """Undo ``to_dict``.

        Raises:
            UserError: a size is impossible.
            TypeError: a size is missing or unknown.
        """
        uneven = tuple(LayerSizes(**sizes) for sizes in values.get("uneven", ()))
        return cls(**{**values, "features": tuple(values.get("features", ())), "uneven": uneven})

    def replace(self, **sizes: Any) -> Shape:
        """Return a copy with some sizes changed; query heads scale with the KV groups unless given explicitly.

        A new ``layers``, ``ffn``, ``heads`` or ``kv_groups`` makes uneven layers even.
        """
        if "kv_groups" in sizes and "heads" not in sizes:
            sizes["heads"] = sizes["kv_groups"] * self.heads_per_group
        if {"layers", *LayerSizes._fields} & sizes.keys():
            sizes.setdefault("uneven", ())
        return Shape(**{**_values(self), **sizes})

    def with_layers(self, sizes: Iterable[LayerSizes]) -> Shape:
        """Return the shape whose layers have these sizes; an even shape if they are all equal.

        Raises:
            UserError: there is no layer, or a size is impossible.
        """
        layers = tuple(sizes)
        if not layers:
            raise UserError("A model needs the sizes of at least one layer.")
        for layer in layers:
            for name, size in layer._asdict().items():
                _check_size(f"{name} of every layer", size)
        uneven = layers if len(set(layers)) > 1 else ()
        return self.replace(layers=len(layers), **_bounds(layers)._asdict(), uneven=uneven)

    def at(self, layer: int | None) -> Shape:
        """Return the even shape with the sizes of one layer; this shape itself for None or if layers are even."""
        if layer is None or not self.uneven:
            return self
        return self.replace(**self.uneven[layer]._asdict())

    @property
    def layer_sizes(self) -> tuple[LayerSizes, ...]:
        """The sizes of every layer, whether even or uneven."""
        return self.uneven or (self._sizes,) * self.layers

    @property
    def _sizes(self) -> LayerSizes:
        return LayerSizes(self.ffn, self.heads, self.kv_groups)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head (g)."""
        return self.heads // self.kv_groups

    def axis(self, name: str) -> int:
        """Return the length of a Layout axis: hidden, ffn, vocab, query (H*h channels) or key (G*h channels)."""
        if name == "query":
            return self.heads * self.head_dim
        if name == "key":
            return self.kv_groups * self.head_dim
        return int(getattr(self, name))

    @property
    def matrix_parameters(self) -> int:
        """Weights in the matrices of all decoder layers: attention ``2 d h (H + G)`` and MLP ``3 d f`` in each."""
        return self.hidden * sum(
            2 * self.head_dim * (heads + kv_groups) + 3 * ffn for ffn, heads, kv_groups in self.layer_sizes
        )

    @property
    def vector_parameters(self) -> int:
        """Weights in the vectors of all decoder layers: two norms each, and those of ``features``."""
        return sum(
            2 * self.hidden + sum(self._feature_parameters(name, sizes) for name in self.features)
            for sizes in self.layer_sizes
        )

    def _feature_parameters(self, feature: str, sizes: LayerSizes) -> int:
        qkv = (sizes.heads + 2 * sizes.kv_groups) * self.head_dim
        return {
            "qkv_bias": qkv,
            "attention_bias": qkv + self.hidden,
            "mlp_bias": 2 * sizes.ffn + self.hidden,
            "qk_norm": 2 * self.head_dim,
        }[feature]

    @property
    def keys_and_values(self) -> int:
        """Elements of the keys and values of one token in all layers, which a KV cache holds."""
        return 2 * self.head_dim * sum(layer.kv_groups for layer in self.layer_sizes)

    @property
    def body_parameters(self) -> int:
        """Parameters without embedding and output head: decoder layers and the final norm."""
        return self.matrix_parameters + self.vector_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied embedding counts once, padding rows do not count."""
        return self.body_parameters + (1 if self.tied else 2) * self.vocab * self.hidden

    def flops_per_token(self, *, sequence_length: int = 0, training: bool) -> int:
        """Return floating-point operations per token; a multiply-add counts as two.

        Matrices and output head count 2 per weight forward and 4 backward (6 N; Kaplan et al., arXiv 2001.08361). With
        a ``sequence_length`` s, causal attention adds ``2 s H h`` per layer forward: half of the full score matrix.
        The embedding lookup and vectors are not counted.
        """
        matrices = 2 * (self.matrix_parameters + self.vocab * self.hidden)
        attention = 2 * sequence_length * self.head_dim * sum(layer.heads for layer in self.layer_sizes)
        return (3 if training else 1) * (matrices + attention)

    def check_parallel(
        self,
        *,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        virtual_pipeline: int | None = None,
        first_stage_layers: int | None = None,
        last_stage_layers: int | None = None,
        fp8: bool = False,
    ) -> None:
        """Refuse parallelism with which Megatron cannot shard this shape.

        Args:
            tensor_parallel: Ranks that share every layer.
            pipeline_parallel: Pipeline stages.
            virtual_pipeline: Model chunks per pipeline stage.
            first_stage_layers: Layers of the first pipeline stage (``stage_layers``).
            last_stage_layers: Layers of the last pipeline stage (``stage_layers``).
            fp8: Also require that Transformer Engine can multiply the shards in FP8: sizes must be multiples of 16.

        Raises:
            UserError: tensor parallelism does not divide the KV groups, ffn or vocabulary; pipeline stages or their
                chunks do not divide the layers; there are chunks but no pipeline; or a shard does not fit FP8.
        """
        for name, size in self._sharded_sizes():
            if size % tensor_parallel:
                legal = [n for n in range(1, size + 1) if not any(size % n for _, size in self._sharded_sizes())]
                raise UserError(
                    f"Tensor parallelism {tensor_parallel} does not divide {name}={size}; "
                    f"legal for this model: {', '.join(map(str, legal[:8]))}."
                )
        stages = self.stage_layers(pipeline_parallel, first_stage_layers, last_stage_layers)
        if virtual_pipeline is not None:
            if (first_stage_layers, last_stage_layers) != (None, None):
                raise UserError(
                    "The stages of a virtual pipeline are equal; leave out the stages' layers or the virtual pipeline."
                )
            self._check_pieces(stages, virtual_pipeline)
        if fp8:
            self._check_fp8(tensor_parallel)

    def stage_layers(self, stages: int, first: int | None = None, last: int | None = None) -> list[int]:
        """Return the number of layers of each pipeline stage.

        Args:
            stages: Pipeline parallelism.
            first: Layers of the first pipeline stage, which also has the embedding; by default as many as the middle
                stages, which share the remaining layers equally.
            last: Layers of the last pipeline stage, which also has the output head; by default as many as the middle
                stages.

        Raises:
            UserError: a pipeline stage would have no layers, or the layers cannot be divided equally.
        """
        if stages == 1:
            if (first, last) != (None, None):
                raise UserError(
                    "first_stage_layers and last_stage_layers need a pipeline_parallel of 2 or more; leave them out."
                )
            return [self.layers]
        middle, rest = stages - (first is not None) - (last is not None), self.layers - (first or 0) - (last or 0)
        fits = rest % middle == 0 and rest >= middle if middle else rest == 0
        if not fits or 0 in (first, last):
            legal = [n for n in range(1, self.layers + 1) if self.layers % n == 0]
            given = {"first": first, "last": last}
            parts = "".join(f", {size} in the {name}," for name, size in given.items() if size is not None)
            raise UserError(
                f"Pipeline parallelism {stages}{parts} does not divide {self.layers} layers; legal for this model: "
                f"{', '.join(map(str, legal))}{self._unequal(stages)}."
            )
        layers = [rest // middle] * middle if middle else []
        if first is not None:
            layers.insert(0, first)
        if last is not None:
            layers.append(last)
        return layers

    def _unequal(self, stages: int) -> str:
        """Return a clause that suggests unequal pipeline stages, if that works: the last has the rest."""
        equal = math.ceil(self.layers / stages)
        last = self.layers - equal * (stages - 1)
        return f"; or {stages} with last_stage_layers: {last}" if last > 0 else ""

    def _check_pieces(self, stages: list[int], pieces: int) -> None:
        if len(stages) == 1:
            raise UserError("A virtual pipeline needs pipeline parallelism of at least 2; leave it out.")
        layers = stages[0]
        if layers % pieces:
            legal = [n for n in range(1, layers + 1) if layers % n == 0]
            raise UserError(
                f"A virtual pipeline of {pieces} does not divide the {layers} layers of a pipeline stage; "
                f"legal for this model: {', '.join(map(str, legal))}."
            )

    def _check_fp8(self, tensor_parallel: int) -> None:
        sizes = [("hidden", self.hidden, 1)]
        for layer in dict.fromkeys(self.layer_sizes):
            sizes.append(("ffn", layer.ffn, tensor_parallel))
            # Rows of the keys; those of the queries and of q, k and v together are multiples of them.
            sizes.append(("kv_groups * head_dim", layer.kv_groups * self.head_dim, tensor_parallel))
        for name, size, ranks in sizes:
            step = _FP8_MULTIPLE * ranks
            if size % step:
                raise UserError(
                    f"FP8 needs shards that are multiples of {_FP8_MULTIPLE}, but {name}={size}"
                    f"{f' over {ranks} ranks' if ranks > 1 else ''} is not; "
                    f"choose a multiple of {step} such as {max(1, size // step) * step}."
                )

    def _sharded_sizes(self) -> list[tuple[str, int]]:
        sizes = [*dict.fromkeys(self.layer_sizes)]
        return [
            *(("kv_groups", layer.kv_groups) for layer in sizes),
            *(("ffn", layer.ffn) for layer in sizes),
            ("vocab", self.vocab),
        ]

    @property
    def spans(self) -> list[str]:
        """``ffn``, ``heads`` and ``kv_groups`` as text: a size, or the smallest and largest of uneven layers."""
        return [_span(row) for row in zip(*self.layer_sizes, strict=True)]

    def __str__(self) -> str:
        ffn, heads, groups = self.spans
        return (
            f"{self.layers} layers, hidden {self.hidden}, ffn {ffn}, "
            f"{heads} heads in {groups} KV groups of {self.head_dim}, "
            f"vocabulary {self.vocab}{' (tied)' if self.tied else ''}, "
            f"{''.join(f'{name}, ' for name in self.features)}{self.parameters / 1e6:,.1f} M parameters"
        )


def _values(shape: Shape) -> dict[str, Any]:
    return {field.name: getattr(shape, field.name) for field in fields(shape)}


def _bounds(layers: tuple[LayerSizes, ...]) -> LayerSizes:
    """Return the sizes of the smallest layer that all of these fit into: the most groups, and the most heads each."""
    groups = max(layer.kv_groups for layer in layers)
    heads_per_group = max(layer.heads // layer.kv_groups for layer in layers)
    return LayerSizes(max(layer.ffn for layer in layers), groups * heads_per_group, groups)


def _span(sizes: tuple[int, ...]) -> str:
    """Return one size, or the smallest and the largest if sizes differ."""
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


_MOST_LAYERS = 10_000
"""Ten times the deepest published models, so that a damaged config cannot exhaust memory."""


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"A model needs {name} to be a positive whole number, not {value!r}.")
    if name == "layers" and value > _MOST_LAYERS:
        raise UserError(f"A model with {value:,} layers is not supported; use at most {_MOST_LAYERS:,}.")
