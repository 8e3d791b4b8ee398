"""Log-probabilities of the next token, which every likelihood task needs, independent of what runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import distributed

from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.evaluation.kv_cache import TransformersDecoder
from nemo_pvs.layerwise.linear import use_fast_linear
from nemo_pvs.layerwise.token_scores import TokenScores, next_token_scores, tokens_at_once
from nemo_pvs.model.hf_classes import model_class
from nemo_pvs.model.layout import Layout


class Decoder(Protocol):
    """Sequences of equal length that a model continues token by token, with the keys and values of what it has read.

    Every rank of a copy of the model makes the same calls.
    """

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """Read token ids [N, S] after all earlier ones; every rank of the copy gets the most probable next ones [N].

        More than one token each can be read only at first.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Let sequence ``rows[i] >= i`` become sequence ``i`` and forget all others."""


class TokenScorer(Protocol):
    """A loaded model, possibly sharded over several ranks."""

    device: torch.device
    vocab: int
    """Logits that a rank holds for each token, which determine the size of batches."""
    replica: int
    """Which copy of the model this rank belongs to; each copy scores its share of the batches."""
    replicas: int
    speaks: bool
    """Whether this rank is the one of its copy that gets the scores and records answers."""
    cache_bytes: int
    """Bytes that a rank holds in the KV cache for each token of a sequence."""

    def score(self, ids: torch.Tensor) -> TokenScores | None:
        """Score token ids [N, S]; every rank of a copy calls it with the same ids, and one of them gets the scores."""

    def decoder(self, rows: int, length: int) -> Decoder:
        """Return a decoder for up to ``rows`` sequences of up to ``length`` tokens; every rank of a copy calls it."""


class TransformersScorer:
    """A checkpoint of any format in its ``transformers`` class (ours for uneven layers), whole on each rank."""

    def __init__(
        self, source: WeightSource, *, dtype: torch.dtype, device: str, rank: int = 0, ranks: int = 1
    ) -> None:
        """Load the weights.

        Args:
            source: The checkpoint.
            dtype: Type of weights and arithmetic.
            device: Device of the model.
            rank: Number of this copy, from 0.
            ranks: Number of copies.
        """
        self.device = torch.device(device)
        self.replica, self.replicas, self.speaks = rank, ranks, True
        shape = shape_of(source)
        self.vocab = shape.vocab
        self.cache_bytes = shape.keys_and_values * dtype.itemsize
        class_ = model_class(source.config)
        with torch.device("meta"):
            config = class_.config_class.from_dict(dict(source.config))
            self.model = class_._from_config(config, attn_implementation="sdpa").eval()
        names = Layout.for_config(source.config).parts(shape)
        weights = {name: source.read(name).to(self.device, dtype) for name in names}
        self.model.load_state_dict(weights, strict=False, assign=True)
        if shape.tied:
            self.model.tie_weights()
        # Not in checkpoints, so still on the meta device.
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config=config).to(self.device)
        assert not any(parameter.is_meta for parameter in self.model.parameters())
        use_fast_linear(self.model)

    @torch.no_grad()
    def score(self, ids: torch.Tensor) -> TokenScores:
        """Score token ids [N, S]; padding is on the right, where a causal model cannot see it."""
        ids = ids.to(self.device)
        states, targets = self.model.model(ids[:, :-1], use_cache=False).last_hidden_state, ids[:, 1:]
        size = tokens_at_once(self.vocab, self.device)
        parts = zip(states.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
        scores = [next_token_scores(self.model.lm_head(part)[None], next_ids[None]) for part, next_ids in parts]
        return TokenScores(*(torch.cat(values, 1).view(targets.shape) for values in zip(*scores, strict=True)))

    def decoder(self, rows: int, length: int) -> TransformersDecoder:
        """Return a decoder for up to ``rows`` sequences of up to ``length`` tokens."""
        return TransformersDecoder(self.model, rows, length)


_CPU_LOGITS_BYTES = 1 << 30
_SHARE_OF_FREE_MEMORY = 0.8


def find_batch_tokens(scorer: TokenScorer, longest: int, probe: Callable[[int], torch.Tensor]) -> int:
    """Return how many tokens fit into a batch, the same number on every rank.

    On a GPU, one sequence of the longest length is scored to measure the memory that it takes. Larger batches are not
    tried until one fails, because a rank that runs out of memory leaves its partners waiting in a collective forever.
    On a CPU, larger batches gain little, so the logits of a batch are limited to 1 GiB.

    Args:
        scorer: The model.
        longest: Number of tokens in the longest sequence.
        probe: Returns token ids [1, S] for a length S.
    """
    if scorer.device.type != "cuda":
        return max(longest, _CPU_LOGITS_BYTES // (4 * scorer.vocab))
    torch.cuda.reset_peak_memory_stats(scorer.device)
    before = torch.cuda.memory_allocated(scorer.device)
    scorer.score(probe(longest))
    taken = max(1, torch.cuda.max_memory_allocated(scorer.device) - before)
    free = torch.cuda.mem_get_info(scorer.device)[0]
    fits = torch.tensor(int(_SHARE_OF_FREE_MEMORY * free / taken * longest))
    if distributed.is_initialized():
        distributed.all_reduce(fits, distributed.ReduceOp.MIN)
    return max(longest, int(fits))
