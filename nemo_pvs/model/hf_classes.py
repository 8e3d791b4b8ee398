"""Model classes that `transformers` lacks; importing this module registers them with AutoModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_pvs.model.layout import Layout
from nemo_pvs.model.pruned_llama import PrunedLlamaConfig, PrunedLlamaForCausalLM

__all__ = ["PrunedLlamaConfig", "PrunedLlamaForCausalLM", "model_class"]

AutoConfig.register(PrunedLlamaConfig.model_type, PrunedLlamaConfig)
AutoModelForCausalLM.register(PrunedLlamaConfig, PrunedLlamaForCausalLM)

_OURS = {PrunedLlamaForCausalLM.__name__: PrunedLlamaForCausalLM}


def model_class(config: Mapping[str, Any]) -> Any:
    """Return the model class, ours or one of ``transformers``, for a ``config.json``.

    Raises:
        UserError: no table in ``conversions/`` names the config's architecture.
    """
    known = Layout.for_config(config).architectures
    name = next(name for name in config["architectures"] if name in known)
    return _OURS.get(name) or getattr(transformers, name)
