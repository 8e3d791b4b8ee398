"""Trains a byte-level BPE tokenizer, for a parent that is trained from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nemo_pvs.data.corpus import Document
from nemo_pvs.data.tokenizer_config import TOKENIZER_CONFIG
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import whole_folder, write_json, write_text

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257
"""The 256 bytes and the end-of-text token, so that every text can be encoded."""


def train_tokenizer(
    documents: Iterable[Document],
    out: Path,
    vocab: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a Hugging Face tokenizer with byte-level BPE, as GPT-2's, to ``out``.

    It splits numbers into digits, as Llama's tokenizers do, adds no special token to a text, and ends a
    document with ``<|endoftext|>``, which is id 0. The same texts in the same order give the same files.

    Args:
        documents: The texts, read once.
        out: The folder, made whole or not at all.
        vocab: Size of the vocabulary.
        progress: Called with (documents read, 0).

    Raises:
        UserError: ``vocab`` is too small, there is no text, or the text has too few different words for it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < SMALLEST_VOCAB:
        raise UserError(f"A vocabulary of {vocab:,} cannot hold the 256 bytes; give {SMALLEST_VOCAB} or more.")
    tokenizer = Tokenizer(models.BPE())
    by_word = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_word])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    count = 0

    def texts() -> Iterator[str]:
        nonlocal count
        for document in documents:
            count += 1
            yield document.text
            if progress:
                progress(count, 0)

    tokenizer.train_from_iterator(texts(), trainer)
    learned = tokenizer.get_vocab_size()
    if learned < vocab:
        raise UserError(
            f"The text has only enough different words for {learned:,} tokens, not for {vocab:,}; give more text, or "
            "a smaller vocabulary."
        )
    with whole_folder(out) as partial:
        write_text(partial / "tokenizer.json", tokenizer.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        write_json(partial / TOKENIZER_CONFIG, {**config, "clean_up_tokenization_spaces": False})
