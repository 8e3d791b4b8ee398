"""Shape: a Llama-family architecture as numbers, and everything that follows from the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

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


@dataclass(frozen=True)
class Shape:
    """The sizes of one model. Counts, FLOPs and legality are computed here and nowhere else."""

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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "tied" and (not isinstance(value, int) or value < 1):
                raise UserError(f"A model needs {field.name} to be a positive whole number, not {value!r}.")
        if self.heads % self.kv_groups:
            raise UserError(
                f"{self.heads} query heads cannot be shared by {self.kv_groups} KV groups; "
                "choose a number of heads that the groups divide."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Read the sizes out of a Hugging Face ``config.json``.

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
        return cls(**{name: values[key] for name, key in _CONFIG_KEYS.items()})

    def to_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a Hugging Face ``config`` with this shape's sizes, ``head_dim`` always explicit."""
        return {**config, **{key: getattr(self, name) for name, key in _CONFIG_KEYS.items()}}

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as a plain dictionary."""
        return asdict(self)

    def replace(self, **sizes: int) -> Shape:
        """Return a copy with some sizes changed; query heads follow the KV groups unless they are given too."""
        if "kv_groups" in sizes and "heads" not in sizes:
            sizes["heads"] = sizes["kv_groups"] * self.heads_per_group
        return Shape(**{**asdict(self), **sizes})

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
    def layer_matrix_parameters(self) -> int:
        """Weights in the matrices of one decoder layer: attention ``2 d h (H + G)`` and MLP ``3 d f``."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_groups) + 3 * self.hidden * self.ffn

    @property
    def body_parameters(self) -> int:
        """Parameters without embedding and output head: decoder layers and the final norm."""
        return self.layers * (self.layer_matrix_parameters + 2 * self.hidden) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied embedding counted once, padding rows never (methods.md section 0)."""
        return self.body_parameters + (1 if self.tied else 2) * self.vocab * self.hidden

    def flops_per_token(self, *, sequence_length: int = 0, training: bool) -> int:
        """Floating-point operations per token, a multiplication and an addition counted as two.

        Matrices and output head count 2 per weight forward and 4 backward (Kaplan et al., 2001.08361, 6 N); with a
        ``sequence_length`` causal attention adds ``2 s H h`` per layer forward, i.e. half of the full score matrix.
        The embedding lookup costs nothing.
        """
        matrices = 2 * (self.layers * self.layer_matrix_parameters + self.vocab * self.hidden)
        attention = 2 * self.layers * sequence_length * self.heads * self.head_dim
        return (3 if training else 1) * (matrices + attention)

    def check_parallel(self, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
        """Refuse a layout that Megatron cannot shard this shape into.

        Raises:
            UserError: tensor parallelism does not divide KV groups, ffn or vocabulary; pipeline stages not layers.
        """
        for name in ("kv_groups", "ffn", "vocab"):
            size = getattr(self, name)
            if size % tensor_parallel:
                legal = [n for n in range(1, size + 1) if self._tensor_parallel_is_legal(n)]
                raise UserError(
                    f"Tensor parallelism {tensor_parallel} does not divide {name}={size}; "
                    f"legal for this model: {', '.join(map(str, legal[:8]))}."
                )
        if self.layers % pipeline_parallel:
            legal = [n for n in range(1, self.layers + 1) if self.layers % n == 0]
            raise UserError(
                f"Pipeline parallelism {pipeline_parallel} does not divide {self.layers} layers; "
                f"legal for this model: {', '.join(map(str, legal))}."
            )

    def _tensor_parallel_is_legal(self, tensor_parallel: int) -> bool:
        return not any(size % tensor_parallel for size in (self.kv_groups, self.ffn, self.vocab))

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden}, ffn {self.ffn}, "
            f"{self.heads} heads in {self.kv_groups} KV groups of {self.head_dim}, "
            f"vocabulary {self.vocab}{' (tied)' if self.tied else ''}, {self.parameters / 1e6:,.1f} M parameters"
        )
