"""Which entry of the weight table each parameter of a Megatron rank is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from megatron.core.models.gpt import GPTModel

from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Entry, Layout
from nemo_pvs.model.shape import Shape

# Norms on their own have the names that Transformer Engine gives them inside of the linear layer behind.
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def gpt_models(chunks: Iterable[torch.nn.Module]) -> list[GPTModel]:
    """Return the models inside of a strategy's chunks: one, or the pieces of a virtual pipeline."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, GPTModel)]


def parameter_entries(
    models: Iterable[GPTModel], layout: Layout, shape: Shape
) -> Iterator[tuple[str, torch.nn.Parameter, Entry]]:
    """Yield every parameter of a rank's model chunks with its name there and its entry of the table.

    The last pipeline stage's copy of a tied embedding is the embedding, too.

    Raises:
        UserError: a weight is not in the table.
    """
    entries = {(entry.layer, entry.megatron): entry for entry in layout.entries(shape)}
    for model in models:
        numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
        for name, parameter in model.named_parameters():
            prefix = next((prefix for prefix in numbers if name.startswith(prefix)), "")
            own = name.removeprefix(prefix)
            for norm, stored in _NORMS.items():
                own = own.replace(norm, stored) if own.startswith(norm) else own
            if own == "output_layer.weight" and shape.tied:
                own = "embedding.word_embeddings.weight"
            entry = entries.get((numbers.get(prefix), own))
            if entry is None:
                raise UserError(
                    f"The weight {name} is in no table of conversions/, so nothing of it can be pruned or carried on."
                )
            yield name, parameter, entry
