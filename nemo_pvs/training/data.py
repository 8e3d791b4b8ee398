"""The data module of training, and the fixed windows that every validation loss is measured on."""

from __future__ import annotations

from nemo.collections import llm


class PretrainingData(llm.PreTrainingDataModule):
    """NeMo's data module without the attention masks that it builds where Transformer Engine is missing.

    The attention is causal by itself in every layer that we train, so a mask per sample is work for nothing.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.create_attention_mask = False
