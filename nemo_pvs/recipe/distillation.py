"""The block ``distill`` of a recipe's training: the teacher, and what is learned from it."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from nemo_pvs.recipe.fields import Block, Initialisation, Positive, Rate, Tokens

PARENT = "parent"
"""The teacher that is the recipe's parent."""


class Distillation(Block):
    """Learning from a teacher's logits (Hinton et al., 1503.02531), as Minitron retrains pruned models (2407.14679).

    The loss is ``lm_weight * LM loss + kl_weight * T^2 KL(teacher || student)``. Where many layers were cut
    Minitron adds hidden states: ``+ hidden_weight * hidden_loss``, a sum over ``layer_pairs``, and
    ``+ embedding_weight * hidden_loss`` behind the embedding; with ``dynamic_weight`` both times
    ``alpha = kl_weight * KL / (hidden_weight * ... + embedding_weight * ...)``.
    """

    teacher: str = PARENT
    """The recipe's parent, or the folder of a checkpoint with the same tokenizer and vocabulary."""
    arms: list[Initialisation] = Field(default=["pruned", "random"], min_length=1)
    """Which arms learn so; the others are trained on the text alone. A target with ``distill: false`` has none."""
    temperature: Rate = 1.0
    """T: both distributions are the softmax of logits divided by it."""
    top_k: Positive | None = None
    """Only so many of the teacher's most likely tokens count, renormalised; all without it."""
    lm_weight: float = Field(default=0.0, ge=0)
    """Of the loss against the text; Minitron found the divergence alone best."""
    kl_weight: Rate = 1.0
    layer_pairs: tuple[tuple[Positive, Positive], ...] = Field(default=(), exclude_if=lambda given: given == ())
    """``[student, teacher]`` layers, counted from 1, behind which hidden states are compared."""
    hidden_weight: float = Field(default=0.0, ge=0, exclude_if=lambda given: given == 0)
    """Of the loss of hidden states, summed over ``layer_pairs``."""
    embedding_weight: float = Field(default=0.0, ge=0, exclude_if=lambda given: given == 0)
    """Of the same loss behind the embedding."""
    dynamic_weight: bool = Field(default=False, exclude_if=lambda given: not given)
    """Let all losses of hidden states together weigh what the divergence does, step by step (2407.14679, section 3.2:
    ``alpha = L_logits / L_is``); the two weights then only share that out. Each step takes the alpha of the losses of
    the step before, and the first has none: gradients of hidden states flow before its logits are there."""
    hidden_loss: Literal["cosine", "mse"] = Field(default="cosine", exclude_if=lambda given: given == "cosine")
    """1 - cosine, which Minitron found best, or the mean squared difference of normalised states; a student of another
    width has one learned projection for all places."""
    pretraining_tokens: Tokens = 0
    """Tokens that a teacher other than the parent was pretrained on, for the ledger; 0 when nobody knows."""

    @model_validator(mode="after")
    def _pairs_make_sense(self) -> Distillation:
        if bool(self.layer_pairs) != (self.hidden_weight > 0):
            raise ValueError("layer_pairs and hidden_weight belong together; give both, or neither")
        if self.dynamic_weight and not self.places:
            raise ValueError("dynamic_weight is of hidden states; give hidden_weight or embedding_weight, too")
        for earlier, later in pairwise(self.layer_pairs):
            if earlier[0] >= later[0] or earlier[1] >= later[1]:
                raise ValueError(
                    f"layer_pairs must go up in student and teacher, but {list(later)} follows {list(earlier)}"
                )
        return self

    @property
    def places(self) -> int:
        """How many hidden states of a token are compared."""
        return len(self.layer_pairs) + (self.embedding_weight > 0)
