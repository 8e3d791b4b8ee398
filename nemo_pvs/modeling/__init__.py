"""``import nemo_pvs.modeling`` registers our model classes with Transformers' AutoModel."""

from nemo_pvs.model.hf_classes import model_class
from nemo_pvs.model.uneven_models import (
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
    PrunedMistralConfig,
    PrunedMistralForCausalLM,
    PrunedQwen2Config,
    PrunedQwen2ForCausalLM,
    PrunedQwen3Config,
    PrunedQwen3ForCausalLM,
)

__all__ = [
    "PrunedLlamaConfig",
    "PrunedLlamaForCausalLM",
    "PrunedMistralConfig",
    "PrunedMistralForCausalLM",
    "PrunedQwen2Config",
    "PrunedQwen2ForCausalLM",
    "PrunedQwen3Config",
    "PrunedQwen3ForCausalLM",
    "model_class",
]
