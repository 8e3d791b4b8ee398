"""A checkpoint as a language model of lm-eval: tokenise requests, batch them, sum log-likelihoods, generate text.

The same class serves every format of checkpoint: a ``TokenScorer`` runs the model. Tokenisation, prefix token,
truncation, rolling windows and stop strings are those of lm-eval's own ``HFLM``; tests compare the results with it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from nemo_pvs.errors import UserError
from nemo_pvs.evaluation import generation
from nemo_pvs.evaluation.generation_settings import GenerationSettings
from nemo_pvs.evaluation.scoring import TokenScorer, find_batch_tokens
from nemo_pvs.evaluation.store import Answer, Journal
from nemo_pvs.layerwise.token_scores import TokenScores
from nemo_pvs.system import ranks

_NOTHING_TO_PREDICT = (
    "An answer of the task has no token of its own: it is empty, or the tokenizer joins it to the last token of its "
    "question; correct the task's documents or its target_delimiter, or leave that task out."
)


class _Request(NamedTuple):
    ids: list[int]
    """Context and continuation, truncated on the left to the model's context plus the last, only predicted token."""
    scored: int
    """Number of tokens in the continuation."""


class CheckpointLM(TemplateLM):
    """A scorer and a tokenizer with lm-eval's interface; all ranks make the same requests and get the same answers."""

    def __init__(
        self,
        scorer: TokenScorer,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        *,
        ends: Collection[int] | None = None,
        batch_size: int | None = None,
        journal: Journal | None = None,
        progress: Callable[..., None] | None = None,
    ) -> None:
        """Combine a model and its tokenizer.

        Args:
            scorer: The model.
            tokenizer: The model's tokenizer.
            context: Maximum number of tokens that the model reads; longer requests are truncated on the left.
            ends: Tokens that end a text; by default the tokenizer's end-of-text token.
            batch_size: Sequences per batch; None fits the number of tokens per batch to memory.
            journal: Records the answers of each batch, and has those of an interrupted run.
            progress: Called with (requests done, requests in all), and with a note while text is generated.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.journal = journal
        self.progress = progress
        self.read: Counter[int] = Counter()
        """Number of sequences that the model has read, by their length in tokens without padding."""
        self._scorer = scorer
        self._context = context
        self._ends = frozenset({self.eot_token_id} - {None} if ends is None else ends)
        self._batch_size = batch_size
        self._batch_tokens: int | None = None
        self._longest = 0

    @property
    def eot_token_id(self) -> Any:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        """Token that precedes a text without context: the beginning-of-text token, or else the end-of-text one.

        Raises:
            UserError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError(
            f"The tokenizer in {self.tokenizer.name_or_path} has neither a beginning-of-text nor an end-of-text "
            "token, one of which must precede texts without context; set eos_token in its config."
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenise with the tokenizer's special tokens, but without a second beginning-of-text token."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        settings: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, verbose=False, **settings)
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """Return the answer to each (context, continuation): log-likelihood, and whether it is the greedy one.

        Raises:
            UserError: a continuation has no token of its own, or more than the model can read.
        """
        if not all(request.args[1] for request in requests):
            raise UserError(_NOTHING_TO_PREDICT)
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of whole texts, in windows as long as the context that predict each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            (text,) = request.args
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._context, 1)
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            counts.append(len(windows) - sum(counts))
        answers = iter(self._loglikelihood_tokens(windows))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy continuation of each (context, settings), without the stop string that ended it.

        Contexts are truncated on the left so that the longest continuation fits the model's context.

        Raises:
            UserError: a request asks for anything but greedy decoding, or for more tokens than the model can read.
        """
        prepared = [self._generation(*request.args) for request in requests]
        keys = [Journal.key(ids, settings) for ids, settings in prepared]
        known = dict(self.journal.read()) if self.journal else {}
        pending = {key: one for key, one in zip(keys, prepared, strict=True) if key not in known}
        # Only requests with the same settings share a batch.
        groups: dict[GenerationSettings, dict[str, list[int]]] = {}
        for key, (ids, settings) in pending.items():
            groups.setdefault(settings, {})[key] = ids
        total = len(known) + len(pending)
        for settings, prompts in groups.items():
            known.update(self._generate(settings, prompts, done=len(known), total=total))
        return [known[key][0] for key in keys]

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        until: Sequence[str] = (),
        ends: Collection[int] | None = None,
    ) -> list[list[int]]:
        """Return the tokens with which the model continues each prompt, as ``generate(do_sample=False)`` does.

        Args:
            prompts: Token ids of each prompt, at least one; all ranks have the same prompts and get the same answers.
            max_new_tokens: Maximum number of new tokens; prompt and new tokens must fit the model's context.
            until: Strings that end a continuation; the token that completes one is the last.
            ends: Tokens that end a text, the last of its continuation; the model's own by default, () for none.
        """
        stop = generation.Stop(self._ends if ends is None else ends, until, self.tokenizer)
        return generation.greedy(self._scorer, prompts, max_new_tokens, stop, batch_size=self._batch_size)

    def _generation(self, context: str, settings: dict[str, Any]) -> tuple[list[int], GenerationSettings]:
        """Return a request's prompt, truncated on the left, and how to continue it."""
        options = GenerationSettings.parse(settings)
        room = self._context - options.max_new_tokens
        if room < 1:
            raise UserError(
                f"A task asks for up to {options.max_new_tokens} new tokens, which do not fit the model's context of "
                f"{self._context}; leave that task out."
            )
        return (self.tok_encode(context) or [self.prefix_token_id])[-room:], options

    def _generate(
        self, settings: GenerationSettings, prompts: dict[str, list[int]], *, done: int, total: int
    ) -> dict[str, Answer]:
        """Return the answers to prompts with the same settings by key."""
        end = self.tokenizer.decode(self.eot_token_id) if self.eot_token_id is not None else None
        until = handle_stop_sequences(list(settings.until), eos=end)
        keys = list(prompts)
        began = time.monotonic()

        def answer(ids: list[int]) -> Answer:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            return (postprocess_generated_text(text, until, None),)

        def record(found: dict[int, list[int]]) -> None:
            if self.journal and self._scorer.speaks:
                self.journal.add({keys[index]: answer(ids) for index, ids in found.items()})

        def show(finished: int, tokens: int) -> None:
            if self.progress:
                speed = tokens * self._scorer.replicas / max(time.monotonic() - began, 1e-9)
                self.progress(done + finished, total, note=f"{speed:,.0f} tokens/s")

        found = generation.greedy(
            self._scorer,
            list(prompts.values()),
            settings.max_new_tokens,
            generation.Stop(self._ends, until, self.tokenizer),
            batch_size=self._batch_size,
            answered=record,
            stepped=show,
        )
        self.read.update(len(prompt) + len(ids) - 1 for prompt, ids in zip(prompts.values(), found, strict=True))
        return {key: answer(ids) for key, ids in zip(keys, found, strict=True)}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[Answer]:
        """Answer requests (ignored, context ids, continuation ids), the longest first."""
        prepared = [self._request(context, continuation) for _, context, continuation in requests]
        keys = [Journal.key(*request) for request in prepared]
        known = dict(self.journal.read()) if self.journal else {}
        new = {key: request for key, request in zip(keys, prepared, strict=True) if key not in known}
        pending = sorted(new.items(), key=lambda item: (-len(item[1].ids), item[0]))
        row = {key: index for index, (key, _) in enumerate(pending)}
        self.read.update(len(request.ids) - 1 for _, request in pending)  # the last token is only predicted
        # One rank of one copy of the model contributes each answer; all others add zero.
        answered = torch.zeros(len(pending), 2, dtype=torch.float64)
        for done, batch in self._batches(pending):
            if (scores := self._score([request for _, request in batch])) is not None:
                answers = {key: _answer(scores, index, request) for index, (key, request) in enumerate(batch)}
                for key, answer in answers.items():
                    answered[row[key]] = torch.tensor(answer, dtype=torch.float64)
                if self.journal:
                    self.journal.add(answers)
            if self.progress:
                self.progress(len(known) + done, len(known) + len(pending))
        ranks.all_reduce(answered)
        for (key, _), (logprob, greedy) in zip(pending, answered.tolist(), strict=True):
            known[key] = (logprob, bool(greedy))
        return [known[key] for key in keys]

    def _request(self, context: list[int], continuation: list[int]) -> _Request:
        if not continuation:  # which would be certain, and so better than all other answers
            raise UserError(_NOTHING_TO_PREDICT)
        if len(continuation) > self._context:
            raise UserError(
                f"A continuation of {len(continuation)} tokens does not fit the model's context of {self._context}; "
                "leave that task out."
            )
        return _Request((context + continuation)[-(self._context + 1) :], len(continuation))

    def _batches(self, pending: list[tuple[str, _Request]]) -> Iterator[tuple[int, list[tuple[str, _Request]]]]:
        """Yield this copy's batches, each with the number of requests that all copies have done after it."""
        if not pending:
            return
        longest = len(pending[0][1].ids)
        if self._batch_size is None and (self._batch_tokens is None or longest > self._longest):
            self._longest = longest
            self._batch_tokens = find_batch_tokens(self._scorer, longest, lambda length: torch.zeros(1, length).long())
        batches, begin = [], 0
        while begin < len(pending):
            # Requests are sorted by length, so the first of a batch determines its width.
            tokens = self._batch_tokens or 0
            size = self._batch_size or max(1, tokens // len(pending[begin][1].ids))
            batches.append((begin + size, pending[begin : begin + size]))
            begin += size
        for end, batch in batches[self._scorer.replica :: self._scorer.replicas]:
            yield min(end, len(pending)), batch

    def _score(self, batch: list[_Request]) -> TokenScores | None:
        ids = torch.zeros(len(batch), len(batch[0].ids), dtype=torch.int64)
        for index, request in enumerate(batch):
            ids[index, : len(request.ids)] = torch.tensor(request.ids)
        return self._scorer.score(ids)


def _answer(scores: TokenScores, index: int, request: _Request) -> Answer:
    """Sum the log-probabilities of one request's continuation in float64."""
    end = len(request.ids) - 1
    scored = slice(end - request.scored, end)
    return float(scores.logprobs[index, scored].double().sum()), bool(scores.greedy[index, scored].all())
