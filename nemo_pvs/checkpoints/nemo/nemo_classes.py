"""The NeMo side of a model family: the ``nemo`` section of its table in ``conversions/``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_pvs.checkpoints.nemo.fiddle_json import Symbol
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout, layouts

FIELDS: Mapping[str, str] = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "initializer_range": "init_method_std",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
"""Hugging Face key, NeMo field: those that are the same for every family."""

PLAIN: Mapping[str, Any] = {
    "activation_func": Symbol("torch.nn.functional", "silu"),
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "glu_linear_offset": 0.0,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
}
"""Megatron fields that change what a model computes, with the values that all classes of every family here have."""


@dataclass(frozen=True)
class RopeScaling:
    """The kind of scaled rotary embedding that NeMo supports for a family."""

    kind: str
    """Hugging Face's ``rope_type``."""
    config: Symbol
    """The config class of models with this scaling."""
    fields: Mapping[str, str]
    """Hugging Face key within ``rope_scaling``, NeMo field."""


class NemoFamily:
    """NeMo's classes and fields for one family, and the defaults that a checkpoint does not store."""

    def __init__(self, layout: Layout) -> None:
        """Read the section of a family's table.

        Raises:
            UserError: the table has no such section, because NeMo does not support the family.
        """
        if "nemo" not in layout.table:
            raise UserError(
                f"No NeMo classes are known for the family {layout.family}, so it stays in the Hugging Face format; "
                f"if NeMo has some, describe them under nemo in conversions/{layout.family}.yaml."
            )
        self.layout = layout
        self._section: Mapping[str, Any] = layout.table["nemo"]

    @classmethod
    def of_class(cls, symbol: Symbol) -> NemoFamily | None:
        """Return the family of a config class, or None if no table lists the class."""
        families = [cls(layout) for layout in layouts() if "nemo" in layout.table]
        return next((family for family in families if symbol in (*family.classes, *family.uneven.values())), None)

    @property
    def model(self) -> Symbol:
        """The model class."""
        return self._symbol(self._section["model"])

    @property
    def config(self) -> Symbol:
        """The config class of models without scaled rotary embeddings."""
        return self._symbol(self._section["config"])

    @property
    def classes(self) -> tuple[Symbol, ...]:
        """All config classes that can be read."""
        return tuple(self._symbol(name) for name in self._section["classes"])

    @property
    def uneven(self) -> dict[Symbol, Symbol]:
        """NeMo's config classes and our subclass of each, which adds sizes for each layer."""
        section = self._section.get("uneven", {"module": "", "classes": {}})
        return {self._symbol(name): Symbol(section["module"], ours) for name, ours in section["classes"].items()}

    @property
    def fields(self) -> dict[str, str]:
        """Hugging Face key and NeMo field of every setting that both have."""
        return {**FIELDS, **self._section.get("fields", {})}

    @property
    def fixed(self) -> Mapping[str, Any]:
        """NeMo fields and the only values with which a model can be expressed in the Hugging Face family."""
        return self._section["fixed"]

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """The family's scaled rotary embedding, if NeMo supports one."""
        section = self._section.get("rope_scaling")
        return section and RopeScaling(section["kind"], self._symbol(section["config"]), section["fields"])

    def defaults(self, symbol: Symbol) -> dict[str, Any]:
        """Return the defaults of a config class and its parents; a checkpoint stores only fields that differ."""
        even = {ours: name for name, ours in self.uneven.items()}.get(symbol, symbol)
        fields = dict(self._section["classes"][even.name])
        parent = fields.pop("extends", None)
        return {**(self.defaults(self._symbol(parent)) if parent else {}), **fields}

    def _symbol(self, name: str) -> Symbol:
        return Symbol(self._section["module"], name)
