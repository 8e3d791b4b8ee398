"""Windows of text, and the perplexity of sliding ones, against a loop over single tokens in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.texts import TEXTS, windows_of
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import loss_statistics, perplexity
from tests.evaluation.models import TASKS, save_byte_model
from tests.evaluation.paper_data import write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder)
    return folder


def token_losses(folder: Path, windows: torch.Tensor, scored: list[int]) -> list[list[float]]:
    """Return the loss of the last ``scored`` tokens of each window, one forward a token, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    losses = []
    for window, count in zip(windows.tolist(), scored, strict=True):
        losses.append([])
        for end in range(len(window) - count, len(window)):
            with torch.no_grad():
                logits = model(torch.tensor([window[:end]])).logits[0, -1]
            losses[-1].append(-float(logits.log_softmax(-1)[window[end]]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("stride", [None, 5, 11])
def test_perplexity_equals_a_loop_over_tokens(folder, data, stride):
    tokens = windows_of("c4", folder, samples=6, sequence_length=24, stride=stride, data=data)
    scored = [23] + [stride or 23] * 5
    losses = token_losses(folder, tokens.ids, scored)
    flat = [loss for window in losses for loss in window]
    measured = perplexity(HuggingFaceSource(folder), tokens, stride=stride)
    assert measured["tokens"] == len(flat)
    assert measured["loss"] == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-4)
    if stride is None:  # windows of one length: the standard error of a mean
        means = torch.tensor([sum(window) / len(window) for window in losses], dtype=torch.float64)
        assert measured["loss_stderr"] == pytest.approx(float(means.std() / 6**0.5), rel=1e-4)
    assert measured["perplexity_stderr"] == pytest.approx(measured["perplexity"] * measured["loss_stderr"])


def test_sliding_windows_predict_every_token_once(folder, data):
    """With more windows the tokens follow one another without a gap."""
    tokens = windows_of("c4", folder, samples=4, sequence_length=24, stride=7, data=data)
    stream = windows_of("c4", folder, samples=1, sequence_length=24 + 3 * 7, data=data).ids[0].tolist()
    predicted = [*tokens.ids[0].tolist(), *tokens.ids[1:, -7:].flatten().tolist()]
    assert predicted == stream
    assert tokens.manifest["cut"] == "windows of 24 every 7"
    sweeps = perplexity(HuggingFaceSource(folder), tokens, stride=7, compute=Compute(memory_limit=2 * 24 * 64 * 4))
    assert sweeps["tokens"] == 23 + 3 * 7
    assert sweeps["loss"] == pytest.approx(perplexity(HuggingFaceSource(folder), tokens, stride=7)["loss"], rel=1e-6)


def test_statistics_of_unequal_windows():
    """A ratio of sums, by hand: losses 2 of 1 token and 6 of 4; the mean is 1.6, residuals 0.4 and -0.4."""
    measured = loss_statistics([(2.0, 1), (6.0, 4)])
    assert measured["loss"] == pytest.approx(1.6)
    assert measured["loss_stderr"] == pytest.approx((2 * 0.4**2 * 2 / 1) ** 0.5 / 5)
    assert loss_statistics([(2.0, 1)])["loss_stderr"] is None


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_held_out_text_by_default_and_training_text_only_for_comparison(folder, data, name):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"samples": 2, "sequence_length": 40, "data": data}
    held_out = windows_of(name, folder, **settings)
    assert tokenizer.decode(held_out.ids[0]).startswith("Dear Anna")
    assert held_out.manifest["cut"] == "chunks of 40"
    training = windows_of(name, folder, train_split=True, **settings)
    assert tokenizer.decode(training.ids[0]).startswith("Only the training split")
    assert training.manifest["cut"] == "chunks of 40, training split"


def test_rows_are_joined_as_in_the_published_code(folder, data):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, separator in (("c4", " "), ("wikitext", "\n\n"), ("cnn_dailymail", " ")):
        text = tokenizer.decode(windows_of(name, folder, samples=1, sequence_length=110, data=data).ids[0])
        assert text[100:].startswith(2 * separator), name  # the row between is empty


def test_a_text_of_ones_own(folder):
    tokens = windows_of(str(TASKS / "letters.jsonl"), folder, samples=100, sequence_length=32)
    assert len(tokens.ids) < 100
    assert tokens.manifest["data_set"].endswith("letters.jsonl")


def test_mistakes_get_one_sentence(folder, data, tmp_path):
    settings = {"samples": 2, "sequence_length": 40}
    missing = r"There is no .*c4-validation.*hf download allenai/c4 en/c4-validation.* --local-dir .*allenai/c4 "
    with pytest.raises(UserError, match=missing):
        windows_of("c4", folder, data=tmp_path, **settings)
    with pytest.raises(UserError, match="fewer than one window of 100000"):
        windows_of("c4", folder, data=data, samples=1, sequence_length=100000)
    with pytest.raises(UserError, match="stride of 40 tokens does not fit windows of 40"):
        windows_of("c4", folder, data=data, stride=40, **settings)
    with pytest.raises(UserError, match="--compat is for c4, wikitext, cnn_dailymail"):
        windows_of(str(TASKS / "letters.jsonl"), folder, train_split=True, **settings)
