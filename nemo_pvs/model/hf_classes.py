"""Model classes that `transformers` lacks; importing this module registers them with AutoModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_pvs.model.layout import Layout
from nemo_pvs.model.uneven_models import (
    PrunedLlamaForCausalLM,
    PrunedMistralForCausalLM,
    PrunedQwen2ForCausalLM,
    PrunedQwen3ForCausalLM,
)

OURS = (PrunedLlamaForCausalLM, PrunedMistralForCausalLM, PrunedQwen2ForCausalLM, PrunedQwen3ForCausalLM)
"""Our model classes, each with a ``config_class``."""

for _ours in OURS:
    AutoConfig.register(_ours.config_class.model_type, _ours.config_class)
    AutoModelForCausalLM.register(_ours.config_class, _ours)


def model_class(config: Mapping[str, Any]) -> Any:
    """Return the model class, ours or one of ``transformers``, for a ``config.json``.

    Raises:
        UserError: no table in ``conversions/`` names the config's architecture.
    """
    known = Layout.for_config(config).architectures
    name = next(name for name in config["architectures"] if name in known)
    ours = {one.__name__: one for one in OURS}
    return ours.get(name) or getattr(transformers, name)
