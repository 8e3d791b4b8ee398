"""Sheared LLaMA: all sizes at once, by masks that are learned in training (Xia et al., 2310.06694)."""

from __future__ import annotations

from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import expected_sizes, in_training
from nemo_pvs.pruning.options import SizesOrPreset

NAME = "sheared-llama"


class ShearedLlamaOptions(SizesOrPreset):
    """The options of Sheared LLaMA; how masks are learned is a block of a recipe, ``learn``."""


METHOD = PruningMethod(
    name=NAME,
    removes="hidden and FFN channels, KV groups and layers, by masks learned in training",
    paper="2310.06694",
    options=ShearedLlamaOptions,
    prune=in_training(NAME),
    expected=expected_sizes(NAME),
    trains=True,
    reads_text=False,
)
