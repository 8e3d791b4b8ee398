"""``import nemo_pvs.modeling`` registers our model classes with Transformers' AutoModel."""

from nemo_pvs.model.hf_classes import PrunedLlamaConfig, PrunedLlamaForCausalLM, model_class

__all__ = ["PrunedLlamaConfig", "PrunedLlamaForCausalLM", "model_class"]
