"""The block ``distill`` of a recipe's ``train``: the teacher and the distillation loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from nemo_pvs.data.teacher_cache import CachePrecision
from nemo_pvs.recipe.fields import Initialisation, Parallelism, Positive, Rate, RecipeBlock, Tokens

PARENT = "parent"
"""The value of ``teacher`` that names the recipe's parent."""


class Cache(RecipeBlock):
    """Where the teacher answers once, before training, and all arms read its answers from disk."""

    top_k: Positive
    """Number of tokens whose log-probabilities are kept for each position."""
    precision: CachePrecision = Field(default="fp16", exclude_if=lambda given: given == "fp16")
    """Type of the log-probabilities on disk. fp16 rounds them by at most 0.004 between -16 and -8, and by less above;
    fp32 is exact and takes two more bytes for each."""
    layout: Parallelism | None = Field(default=None, exclude_if=lambda given: given is None)
    """How the teacher is spread over ranks; by default as the recipe's ``layout`` says for TP, PP and DP."""


class Distillation(RecipeBlock):
    """Distillation from a teacher's logits (Hinton et al., 1503.02531), as in Minitron (2407.14679).

    The loss is ``lm_weight * LM loss + kl_weight * T^2 KL(teacher || student)``. If many layers were removed,
    Minitron adds losses on hidden states: ``hidden_weight * hidden_loss`` summed over ``layer_pairs``, and
    ``embedding_weight * hidden_loss`` after the embedding. With ``dynamic_weight`` both are multiplied by
    ``alpha = kl_weight * KL / (hidden_weight * ... + embedding_weight * ...)``.
    """

    teacher: str = PARENT
    """The recipe's parent, or the folder of a checkpoint with the same tokenizer and vocabulary."""
    arms: list[Initialisation] = Field(default=["pruned", "random"], min_length=1)
    """Which arms are distilled; the others are trained on the text alone, as are all arms of a target with
    ``distill: false``."""
    temperature: Rate = 1.0
    """T: logits are divided by it before the softmax, in teacher and student."""
    top_k: Positive | None = None
    """Restrict the divergence to the teacher's k most likely tokens; all tokens by default, or all that ``cache``
    keeps."""
    rest: Literal["renormalise", "class"] = Field(
        default="renormalise", exclude_if=lambda given: given == "renormalise"
    )
    """With ``top_k``, what becomes of the probability of all other tokens: it is left out and that of the k tokens is
    renormalised, or it is one more class (at temperature 1), so that the student also learns how much there is."""
    cache: Cache | None = Field(default=None, exclude_if=lambda given: given is None)
    """Compute the teacher's answers once and read them in every arm; by default each arm runs the teacher itself."""
    lm_weight: float = Field(default=0.0, ge=0)
    """Weight of the language modelling loss; Minitron found the divergence alone best."""
    kl_weight: Rate = 1.0
    layer_pairs: tuple[tuple[Positive, Positive], ...] = Field(default=(), exclude_if=lambda given: given == ())
    """``[student, teacher]`` layers, counted from 1, whose output hidden states are compared."""
    hidden_weight: float = Field(default=0.0, ge=0, exclude_if=lambda given: given == 0)
    """Weight of the hidden state loss, summed over ``layer_pairs``."""
    embedding_weight: float = Field(default=0.0, ge=0, exclude_if=lambda given: given == 0)
    """Weight of the same loss after the embedding."""
    dynamic_weight: bool = Field(default=False, exclude_if=lambda given: not given)
    """Scale the hidden state losses at every step so that together they weigh as much as the divergence (2407.14679,
    section 3.2: ``alpha = L_logits / L_is``); the two weights then only set their proportions. Each step uses the
    alpha of the previous step's losses, and the first step has none: hidden state gradients flow before the logits
    are known."""
    hidden_loss: Literal["cosine", "mse"] = Field(default="cosine", exclude_if=lambda given: given == "cosine")
    """1 - cosine, which Minitron found best, or the mean squared difference of normalised states; a student of a
    different width has one learned projection, shared by all pairs."""
    pretraining_tokens: Tokens = 0
    """Tokens that a teacher other than the parent was pretrained on, for the ledger; 0 if unknown."""

    @model_validator(mode="after")
    def _pairs_make_sense(self) -> Distillation:
        if bool(self.layer_pairs) != (self.hidden_weight > 0):
            raise ValueError("layer_pairs and hidden_weight belong together; give both, or neither")
        if self.dynamic_weight and not self.places:
            raise ValueError("dynamic_weight scales hidden state losses; also give hidden_weight or embedding_weight")
        for earlier, later in pairwise(self.layer_pairs):
            if earlier[0] >= later[0] or earlier[1] >= later[1]:
                raise ValueError(
                    f"layer_pairs must increase in student and teacher, but {list(later)} follows {list(earlier)}"
                )
        return self

    @model_validator(mode="after")
    def _tokens_make_sense(self) -> Distillation:
        if self.cache and self.top_k and self.top_k > self.cache.top_k:
            raise ValueError(f"top_k is {self.top_k}, but cache.top_k keeps only {self.cache.top_k}; raise the latter")
        if self.cache and self.places:
            raise ValueError(
                "a cache has the teacher's log-probabilities, not its hidden states; leave out cache, or layer_pairs "
                "and embedding_weight"
            )
        if self.rest == "class" and not self.kept:
            raise ValueError("rest says what becomes of tokens that top_k leaves out; give top_k, or leave rest out")
        if self.rest == "class" and self.temperature != 1:
            raise ValueError("rest: class needs temperature 1, at which the rest is known; renormalise, or leave it 1")
        return self

    @property
    def kept(self) -> int | None:
        """Number of the teacher's tokens that count; None for all."""
        return self.top_k or (self.cache.top_k if self.cache else None)

    @property
    def places(self) -> int:
        """Number of hidden states compared per token."""
        return len(self.layer_pairs) + (self.embedding_weight > 0)
