"""EfficientLLM: units are removed one by one while the model trains (2502.06663)."""

from __future__ import annotations

from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import in_training
from nemo_pvs.pruning.options import Options

NAME = "efficient-llm"


class EfficientLLMOptions(Options):
    """EfficientLLM has none; how much it removes, and when, is a block of a recipe, ``pruning_aware``."""


METHOD = PruningMethod(
    name=NAME,
    removes="hidden and FFN channels and KV groups, one by one while the model trains",
    paper="2502.06663",
    options=EfficientLLMOptions,
    prune=in_training(NAME),
    trains=True,
    reads_text=False,
)
