"""Layers of different sizes, as Megatron-Core's heterogeneous models describe them: a JSON text of ``block_configs``.

The KV groups and FFN width of each layer may differ, but all layers have the same query heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import LayerSizes, Shape

_FFN_MULTIPLE = 256
"""To which Megatron-Core rounds an FFN width that is given relative to the hidden size."""


def block_configs(shape: Shape) -> str:
    """Return the JSON text that describes the layers of an uneven model.

    Raises:
        UserError: the layers have different numbers of query heads.
    """
    heads = sorted({layer.heads for layer in shape.uneven})
    if len(heads) > 1:
        raise UserError(
            f"The layers of this model have {heads[0]} to {heads[-1]} query heads, but those of a Megatron model all "
            "have the same number; pad them with pvs convert --uneven pad."
        )
    blocks = []
    for layer in shape.uneven:
        present = {"no_op": False, "replace_with_linear": False}
        blocks.append(
            {
                "attention": {**present, "num_query_groups": layer.kv_groups},
                "mlp": {**present, "ffn_hidden_size": layer.ffn},
            }
        )
    return json.dumps({"block_configs": blocks})


def layer_sizes(text: Any, fields: Mapping[str, Any], path: Path) -> list[LayerSizes]:
    """Return the sizes of every layer of a heterogeneous model.

    Args:
        text: The JSON text.
        fields: The provider's fields, with ``num_attention_heads`` and ``hidden_size``.
        path: The file that states them, for messages.

    Raises:
        UserError: it is not such a text, or a layer lacks its attention or its MLP.
    """
    try:
        blocks = json.loads(text)["block_configs"]
        return [_layer(index, block, fields, path) for index, block in enumerate(blocks)]
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise UserError(
            f"{path} has a heterogeneous_layers_config_encoded_json that does not describe layers; copy the "
            "checkpoint again."
        ) from None


def _layer(index: int, block: Mapping[str, Any], fields: Mapping[str, Any], path: Path) -> LayerSizes:
    attention, mlp = block["attention"], block.get("mlp") or block["ffn"]
    for name, part in (("attention", attention), ("MLP", mlp)):
        if part.get("no_op") or part.get("replace_with_linear"):
            what = "no" if part.get("no_op") else "a linear layer in place of its"
            raise UserError(f"Layer {index} of the model in {path} has {what} {name}; such a model is not supported.")
    heads, groups, ffn = fields["num_attention_heads"], attention.get("num_query_groups"), mlp.get("ffn_hidden_size")
    if groups is None:  # the spelling of Nemotron's config.json
        groups = heads // attention["n_heads_in_group"]
    if ffn is None:
        width = int(2 * mlp["ffn_mult"] * fields["hidden_size"] / 3)
        ffn = -(-width // _FFN_MULTIPLE) * _FFN_MULTIPLE
    return LayerSizes(ffn, heads, groups)
