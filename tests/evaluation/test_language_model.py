"""Answers to requests are those of lm-eval's own HFLM, and of a float64 loop over single tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.scoring import TransformersScorer, find_batch_tokens
from nemo_pvs.evaluation.store import Journal
from nemo_pvs.layerwise.token_scores import next_token_scores
from tests.evaluation.models import TASKS, VOCAB, save_byte_model, save_byte_tokenizer
from tests.families import save_tiny
from tests.uneven_model import BIASES, make_uneven

CONTEXT = 48
TEXTS = [json.loads(line)["text"] for line in (TASKS / "letters.jsonl").read_text().splitlines()]
PAIRS = [
    *((text[:cut], text[cut : cut + 20]) for text in TEXTS for cut in (5, 30, 90)),  # the last do not fit the context
    ("", "without context"),
    ("A space at the end ", "belongs to the continuation"),
    ("Same context", " a"),
    ("Same context", " b"),
    ("Same context", " a"),
]


def requests(items: list[Any]) -> list[Any]:
    return [SimpleNamespace(args=item) for item in items]


def ours(folder: Path, **settings: Any) -> CheckpointLM:
    scorer = TransformersScorer(HuggingFaceSource(folder), dtype=torch.float32, device="cpu")
    return CheckpointLM(scorer, AutoTokenizer.from_pretrained(folder), CONTEXT, **settings)


def hflm(folder: Path) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT, batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model") / "model")


def make(kind: str, folder: Path) -> Path:
    if kind == "uneven":
        return save_byte_tokenizer(make_uneven(folder, std=0.1, vocab_size=VOCAB, **BIASES))
    if kind == "tied":
        return save_byte_model(folder, std=0.1, tie_word_embeddings=True)
    return save_byte_tokenizer(save_tiny(folder, kind, vocab_size=VOCAB))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "uneven", "mistral", "qwen2", "qwen3"])
def test_every_request_is_answered_as_by_hflm(kind, tmp_path):
    folder = make(kind, tmp_path / "model")
    pairs, texts = requests(PAIRS), requests([(text,) for text in [*TEXTS, "x"]])
    expected = hflm(folder)
    answers = ours(folder, batch_size=3).loglikelihood(pairs)
    for answer, reference in zip(answers, expected.loglikelihood(pairs), strict=True):
        assert answer == (pytest.approx(reference[0], abs=1e-4), reference[1])
    rolling = ours(folder).loglikelihood_rolling(texts)
    assert rolling == pytest.approx(expected.loglikelihood_rolling(texts), abs=1e-3)


def test_a_nemo_checkpoint_on_transformers_gives_the_same_numbers(folder, tmp_path):
    write_nemo(HuggingFaceSource(folder), tmp_path / "nemo")
    scorer = TransformersScorer(NemoSource(tmp_path / "nemo"), dtype=torch.float32, device="cpu")
    model = CheckpointLM(scorer, AutoTokenizer.from_pretrained(folder), CONTEXT)
    assert model.loglikelihood(requests(PAIRS)) == ours(folder).loglikelihood(requests(PAIRS))


def test_log_likelihood_is_a_sum_over_tokens_in_float64(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    context, continuation = "Dear Anna, the", " boat came late"
    ids = tokenizer.encode(context + continuation)
    total, greedy = 0.0, True
    for end in range(len(tokenizer.encode(context)), len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:end]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[ids[end]])
        greedy &= int(logits.argmax()) == ids[end]
    [answer] = ours(folder).loglikelihood(requests([(context, continuation)]))
    assert answer == (pytest.approx(total, abs=1e-4), greedy)


def test_the_most_probable_continuation_is_greedy(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    context = next(
        text[:cut]
        for text in TEXTS
        for cut in range(3, 47)
        if int(model(torch.tensor([tokenizer.encode(text[:cut])])).logits[0, -1].argmax()) < 94  # a printable byte
    )
    best = int(model(torch.tensor([tokenizer.encode(context)])).logits[0, -1].argmax())
    others = [token for token in range(94) if token != best][:2]
    pairs = [(context, tokenizer.decode([token])) for token in (best, *others)]
    assert [greedy for _, greedy in ours(folder).loglikelihood(requests(pairs))] == [True, False, False]


def test_batches_do_not_matter(folder):
    expected = ours(folder, batch_size=1).loglikelihood(requests(PAIRS))
    for size in (2, 5, None):
        for answer, reference in zip(
            ours(folder, batch_size=size).loglikelihood(requests(PAIRS)), expected, strict=True
        ):
            assert answer == (pytest.approx(reference[0], abs=1e-4), reference[1])


def test_a_killed_task_goes_on_where_it_was(folder, tmp_path):
    class KilledError(Exception):
        pass

    model = ours(folder, batch_size=2, journal=Journal(tmp_path / "journal"))
    score, calls = model._scorer.score, []

    def dying(ids: torch.Tensor) -> Any:
        if len(calls) == 3:
            raise KilledError
        calls.append(len(ids))
        return score(ids)

    model._scorer.score = dying
    with pytest.raises(KilledError):
        model.loglikelihood(requests(PAIRS))
    again = ours(folder, batch_size=2, journal=Journal(tmp_path / "journal"))
    score_again, later, steps = again._scorer.score, [], []
    again._scorer.score = lambda ids: (later.append(len(ids)), score_again(ids))[1]
    again.progress = lambda done, total: steps.append((done, total))
    answers = again.loglikelihood(requests(PAIRS))
    different = len(set(PAIRS))
    assert sum(calls) == 6
    assert sum(later) == different - 6
    assert steps[0][0] == 8
    assert steps[-1] == (different, different)
    for answer, reference in zip(answers, ours(folder).loglikelihood(requests(PAIRS)), strict=True):
        assert answer == (pytest.approx(reference[0], abs=1e-4), reference[1])


def test_a_torn_journal_is_read_up_to_the_tear(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.add({"a": (-1.5, True), "b": (-2.5, False)})
    [file] = (tmp_path / "journal").iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    assert journal.read() == {"a": (-1.5, True)}
    journal.add({"c": (-3.0, False)})
    assert journal.read() == {"a": (-1.5, True), "c": (-3.0, False)}
    assert Journal.key([1, 2, 3], 1) != Journal.key([1, 2, 3], 2)
    journal.remove()
    assert journal.read() == {}


def test_what_cannot_be_answered_is_said(folder):
    model = ours(folder)
    with pytest.raises(UserError, match=f"continuation of {CONTEXT + 1} tokens does not fit the model's context"):
        model.loglikelihood(requests([("x", "y" * (CONTEXT + 1))]))
    for context in ("", "x"):
        with pytest.raises(UserError, match="has no token of its own: it is empty, or the tokenizer joins it"):
            model.loglikelihood(requests([(context, "yes"), (context, "")]))
    assert model.loglikelihood_rolling(requests([("",)])) == [0]
    model.tokenizer.eos_token = None
    with pytest.raises(UserError, match="set eos_token in its config"):
        model.loglikelihood(requests([("", "x")]))


def test_an_answer_that_the_tokenizer_joins_to_its_question_is_not_certain(folder, tmp_path):
    """Nothing would be left to predict, and the sum of no log-probabilities is better than any other."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "ab"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [("a", "b")])), eos_token="ab")
    model = CheckpointLM(ours(folder)._scorer, tokenizer, CONTEXT)
    assert len(model.loglikelihood(requests([("x", "b")]))) == 1
    with pytest.raises(UserError, match="has no token of its own"):
        model.loglikelihood(requests([("xa", "b"), ("xa", "c")]))


def test_sharded_scores_need_only_their_own_columns():
    """What one rank adds up over its columns, with a group of nobody else: a softmax over those columns."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator) * 5
    targets = torch.randint(0, 7, (2, 3), generator=generator)
    scores = next_token_scores(logits, targets)
    expected = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(scores.logprobs.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.greedy, logits.argmax(-1) == targets)
    shifted = next_token_scores(logits, targets + 100, first_column=100)
    assert torch.equal(shifted.logprobs, scores.logprobs)


def test_a_batch_on_a_cpu_is_bounded_by_its_logits(folder):
    scorer = ours(folder)._scorer
    scorer.vocab = 1 << 20
    assert find_batch_tokens(scorer, 100, lambda length: torch.zeros(1, length).long()) == 256
    assert find_batch_tokens(scorer, 1000, lambda length: torch.zeros(1, length).long()) == 1000
