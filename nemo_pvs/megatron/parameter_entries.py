"""Map each parameter of a Megatron rank to its entry in the weight table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from megatron.core.models.gpt import GPTModel

from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Entry, Layout
from nemo_pvs.model.shape import Shape

# The table names a norm as Transformer Engine does, which fuses it into the linear layer that follows.
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def gpt_models(chunks: Iterable[torch.nn.Module]) -> list[GPTModel]:
    """Return the models inside a strategy's chunks: one, or several with a virtual pipeline."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, GPTModel)]


def parameter_entries(
    models: Iterable[GPTModel], layout: Layout, shape: Shape
) -> Iterator[tuple[str, torch.nn.Parameter, Entry]]:
    """Yield (name in its model chunk, parameter, entry of the weight table) for every parameter of a rank.

    The last pipeline stage's copy of a tied embedding maps to the embedding, too.

    Raises:
        UserError: a weight is not in the table.
    """
    entries = {(entry.layer, entry.megatron): entry for entry in layout.entries(shape)}
    for model in models:
        numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
        for name, parameter in model.named_parameters():
            prefix = next((prefix for prefix in numbers if name.startswith(prefix)), "")
            local_name = name.removeprefix(prefix)
            for norm, fused in _NORMS.items():
                local_name = local_name.replace(norm, fused) if local_name.startswith(norm) else local_name
            if local_name == "output_layer.weight" and shape.tied:
                local_name = "embedding.word_embeddings.weight"
            entry = entries.get((numbers.get(prefix), local_name))
            if entry is None:
                raise UserError(
                    f"The weight {name} is not in this family's table in conversions/, so it cannot be pruned and its "
                    "optimizer state cannot be carried over; add it to the table."
                )
            yield name, parameter, entry
