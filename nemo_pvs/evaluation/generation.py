"""Greedy decoding in batches, independent of what runs the model.

A batch has no padding, and so needs no mask and gives every token its true position: all prompts are read up to the
length of the shortest one at once, and then token by token, in the steps in which the shorter ones are continued.
Finished sequences leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import distributed
from transformers import PreTrainedTokenizerBase

from nemo_pvs.evaluation.scoring import Decoder, TokenScorer, find_batch_tokens
from nemo_pvs.system import ranks

_CPU_CACHE_BYTES = 1 << 30
_CPU_ROWS = 32  # more gain little
_SHARE_OF_FREE_MEMORY = 0.4  # for the cache; as much for reading the prompts
_SPREAD = 0.25
"""How much longer than the shortest the longest prompt of a batch may be, as a share of the new tokens."""


class Stop:
    """Where a continuation ends: after an end-of-text token, or as soon as its text contains one of some strings."""

    def __init__(
        self, ends: Collection[int], texts: Sequence[str] = (), tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Store the conditions.

        Args:
            ends: Tokens that end a text.
            texts: Strings that end a text, wherever tokens begin and end; special tokens count as their names.
            tokenizer: Decodes tokens, if there are strings.
        """
        self._ends = frozenset(ends)
        self._texts = [text for text in texts if text]
        self._tokenizer = tokenizer
        # A token has at least one byte. Two more, because the first ones of a window may be decoded differently.
        self._window = 2 + max((len(text.encode()) for text in self._texts), default=0)

    def __call__(self, ids: Sequence[int]) -> bool:
        """Return whether the last of these tokens ends the continuation, if none before did."""
        if ids[-1] in self._ends:
            return True
        if not self._texts or self._tokenizer is None:
            return False
        end = self._tokenizer.decode(list(ids[-self._window :]), skip_special_tokens=False)
        return any(text in end for text in self._texts)


def greedy(
    scorer: TokenScorer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Callable[[Sequence[int]], bool],
    *,
    batch_size: int | None = None,
    answered: Callable[[dict[int, list[int]]], None] | None = None,
    stepped: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, the same on every rank; copies of the model share the prompts.

    Args:
        scorer: The model.
        prompts: Token ids of each prompt, at least one.
        max_new_tokens: Maximum number of tokens in a continuation.
        stop: Whether a continuation ends with its last token, which is part of the result.
        batch_size: Sequences per batch; None fits the batch to memory.
        answered: Called after each batch of this copy of the model with its continuations, by number of prompt.
        stepped: Called after each new token with the number of prompts that are finished, counting earlier batches of
            other copies of the model, and the number of new tokens of this copy.
    """
    answers: dict[int, list[int]] = {}
    if max_new_tokens < 1:
        return [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = list(_batches(scorer, [(index, len(prompts[index])) for index in order], max_new_tokens, batch_size))
    tokens = before = 0
    for number, batch in enumerate(batches):
        if number % scorer.replicas == scorer.replica:

            def show(finished: int, before: int = before) -> None:
                nonlocal tokens
                tokens += 1
                if stepped:
                    stepped(before + finished, tokens)

            longest = len(prompts[batch[0]])
            decoder = scorer.decoder(len(batch), longest + max_new_tokens)
            found = _continue(decoder, [prompts[index] for index in batch], max_new_tokens, stop, show)
            ours = dict(zip(batch, found, strict=True))
            if answered:
                answered(ours)
            answers.update(ours)
        before += len(batch)
    answers = ranks.merged(answers)
    return [answers[index] for index in range(len(prompts))]


def _continue(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Callable[[Sequence[int]], bool],
    show: Callable[[int], None],
) -> list[list[int]]:
    """Continue the prompts of one batch; call ``show`` for each new token with the number of finished prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt in each row of the batch
    position = min(map(len, prompts))
    ids = torch.tensor([list(prompt[:position]) for prompt in prompts])
    while True:
        read, finished = [], []
        for row, token in enumerate(decoder.next(ids).tolist()):
            prompt, answer = prompts[rows[row]], answers[rows[row]]
            if position < len(prompt):
                read.append(prompt[position])
                continue
            read.append(token)
            answer.append(token)
            if len(answer) == max_new_tokens or stop(answer):
                finished.append(row)
            show(len(prompts) - len(rows) + len(finished))
        kept = list(range(len(rows)))
        for row in reversed(finished):  # the last row takes its place
            kept[row] = kept[-1]
            kept.pop()
        if not kept:
            return answers
        if finished:
            decoder.keep(kept)
            rows = [rows[row] for row in kept]
        ids = torch.tensor([[read[row]] for row in kept])
        position += 1


def _batches(
    scorer: TokenScorer, lengths: Sequence[tuple[int, int]], max_new_tokens: int, batch_size: int | None
) -> Iterator[list[int]]:
    """Divide prompts (number, length), sorted by descending length, into batches of similar lengths."""
    if not lengths:
        return
    rows = batch_size or _rows(scorer, lengths[0][1], max_new_tokens)
    batch: list[int] = []
    longest = 0
    for index, length in lengths:
        if batch and (len(batch) == rows or longest - length > _SPREAD * max_new_tokens):
            yield batch
            batch = []
        if not batch:
            longest = length
        batch.append(index)
    yield batch


def _rows(scorer: TokenScorer, longest: int, max_new_tokens: int) -> int:
    """Return how many sequences fit into a batch, the same number on every rank."""
    row_bytes = scorer.cache_bytes * (longest + max_new_tokens)
    if scorer.device.type != "cuda":
        return max(1, min(_CPU_ROWS, _CPU_CACHE_BYTES // row_bytes))
    prompts = find_batch_tokens(scorer, longest, lambda length: torch.zeros(1, length).long()) // (2 * longest)
    free = torch.cuda.mem_get_info(scorer.device)[0]
    rows = torch.tensor(min(prompts, int(_SHARE_OF_FREE_MEMORY * free / row_bytes)))
    if distributed.is_initialized():
        distributed.all_reduce(rows, distributed.ReduceOp.MIN)
    return max(1, int(rows))
