"""A tokenizer small enough to train in a test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

needs_wikipedia_sample = pytest.mark.skipif(
    importlib.util.find_spec("gensim") is None, reason="the sample lies in gensim's wheel"
)

SENTENCES = [
    "The parent model is pruned, and the pruned model is trained on.",
    "Training from scratch starts from random weights; it sees the same tokens in the same order.",
    "Zwei Sätze auf Deutsch – mit Umlauten: äöü, ß.",
]


def save_tokenizer(folder: Path, *, vocab_size: int = 400, eos: str | None = "<|end|>") -> Path:
    """Save a byte-level BPE tokenizer, which decodes to exactly what it encoded, in ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # Like Llama 3's, it puts a begin-of-text token before a text unless told otherwise.
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token=eos, model_max_length=16
    ).save_pretrained(folder)
    return folder


def save_tokenizer_with_gap(folder: Path, last: int) -> Path:
    """Save a tokenizer in which the word for "the" has the id ``last`` and all ids between are not used."""
    file = save_tokenizer(folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    assert "Ġthe" in content["model"]["vocab"]
    content["model"]["vocab"]["Ġthe"] = last
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "tokenizer")
