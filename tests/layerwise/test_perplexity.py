"""Perplexity is that of transformers, whatever the checkpoint's format."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from tests.state_source import StateSource, random_ids, tiny_model


def token_set(samples: int = 5, length: int = 30) -> TokenSet:
    return TokenSet.from_stream(random_ids(1, samples * length, seed=3)[0].numpy(), sequence_length=length)


def test_it_is_the_mean_loss_of_transformers(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", initializer_range=0.2)
    tokens = token_set()
    ids = tokens.ids.long()
    with torch.no_grad():
        expected = float(AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss)
    measured = perplexity(HuggingFaceSource(folder), tokens, compute=Compute(batch_size=2))
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["perplexity"] == math.exp(measured["loss"])
    assert measured["tokens"] == 5 * 29


def test_a_nemo_copy_has_the_same_perplexity(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    huggingface = HuggingFaceSource(
        make_tiny_llama(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    )
    write_nemo(huggingface, tmp_path / "nemo")
    assert perplexity(NemoSource(tmp_path / "nemo"), token_set()) == perplexity(huggingface, token_set())


def test_neither_batches_nor_sweeps_matter() -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    expected = perplexity(source, tokens)["loss"]
    assert perplexity(source, tokens, compute=Compute(batch_size=1))["loss"] == pytest.approx(expected, rel=1e-6)
    steps: list[tuple[int, int]] = []
    swept = perplexity(
        source,
        tokens,
        compute=Compute(memory_limit=2 * 30 * 64 * 4),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert swept["loss"] == pytest.approx(expected, rel=1e-6)
    assert swept["tokens"] == 5 * 29
    assert steps == [(step, 3 * 4) for step in range(1, 13)]


def test_knowing_nothing_costs_the_logarithm_of_the_vocabulary() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    measured = perplexity(StateSource(model), token_set())
    assert measured["loss"] == pytest.approx(math.log(128), rel=1e-6)
    assert measured["perplexity"] == pytest.approx(128, rel=1e-5)


def test_a_huge_loss_has_infinite_perplexity() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    measured = perplexity(StateSource(model), token_set())
    assert measured["loss"] > 1000
    assert measured["perplexity"] == math.inf


def test_windows_may_end_one_token_behind_the_context() -> None:
    """The last token is predicted, never read."""
    source = StateSource(tiny_model(max_position_embeddings=29))
    assert perplexity(source, token_set())["tokens"] == 5 * 29
    with pytest.raises(UserError, match="do not fit the model's context of 28"):
        perplexity(StateSource(tiny_model(max_position_embeddings=28)), token_set())


def test_bits_per_byte_are_of_the_bytes_that_are_predicted() -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    size = torch.arange(128) % 7
    measured = perplexity(source, tokens, token_bytes=size)
    plain = perplexity(source, tokens)
    assert {name: measured[name] for name in plain} == plain
    assert measured["bytes"] == int(size[tokens.ids[:, 1:].long()].sum())
    bits = measured["loss"] * measured["tokens"] / math.log(2)
    assert measured["bits_per_byte"] == pytest.approx(bits / measured["bytes"])
    # One byte each: bits per byte are bits per token, and so is their error.
    single = perplexity(source, tokens, token_bytes=torch.ones(128))
    assert single["bits_per_byte"] == pytest.approx(plain["loss"] / math.log(2))
    assert single["bits_per_byte_stderr"] == pytest.approx(plain["loss_stderr"] / math.log(2))


def test_bits_per_byte_of_sliding_windows_count_each_byte_once() -> None:
    source, stream = StateSource(tiny_model()), random_ids(1, 50, seed=3)[0].numpy()
    windows = [stream[start : start + 20] for start in range(0, 31, 10)]
    names = {"data_set": "x", "source_sha256": None, "tokenizer_sha256": None, "seed": None}
    measured = perplexity(source, TokenSet.from_windows(windows, **names), stride=10, token_bytes=torch.ones(128))
    assert measured["bytes"] == measured["tokens"] == 49
