from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from nemo_pvs.data import encoder
from nemo_pvs.data.encoder import LibraryEncoder, WordEncoder, make_encoder, tokenizer_json
from tests.conftest import cases

from .conftest import SENTENCES

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "SmolLM2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "Llama 3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(encoder._LLAMA3), "isolated"), BYTES]),
    "Qwen 2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(encoder._QWEN2), "isolated"), BYTES]),
}


def _description(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens(["[unused]"])
    return tokenizer.to_str()


def _text(generator: random.Random) -> str:
    """Words, blanks, contractions and digits in any order, and any characters at all."""
    pieces = [
        *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "'s", "'S", "'\u017f", "'LL", "'"),
        *(
            "the",
            "Model",
            "ä",
            "e\u0301",
            "\u00e9",
            "ß",
            "Ǆ",
            "١",
            "12345",
            "½",
            "Ⅷ",
            "一",
            "😀",
            "👩‍🔬",
            "\u200d",
            "...",
            "<|end|>",
        ),
        *("[unused]", "\U00010400", "\U0001d7d8", "\u0c5c", "\ua7d2"),
    ]
    chosen = [generator.choice(pieces) for _ in range(generator.randrange(40))]
    anything = [chr(generator.choice([*range(1, 0x3000), *range(0xE000, 0x10000)])) for _ in range(10)]
    return "".join([*chosen, *anything] if generator.random() < 0.5 else chosen)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("name", SPLITS)
def test_words_give_the_ids_of_the_library(name: str, normalizer: normalizers.Normalizer | None) -> None:
    generator = random.Random(name)
    description = _description(SPLITS[name], normalizer)
    ours, theirs = make_encoder(description, None, "int32"), LibraryEncoder(description, "int32")
    assert isinstance(ours, WordEncoder)
    for _ in range(cases(5)):
        texts = [_text(generator) for _ in range(20)]
        assert ours.encode(texts) == theirs.encode(texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_every_character_in_every_company(name: str) -> None:
    """Between letters, digits, blanks and signs; words are compared, because equal ids may hide other words."""
    description = _description(SPLITS[name])
    encoder_of_words = make_encoder(description, None, "int32")
    assert isinstance(encoder_of_words, WordEncoder)
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    sample = [*characters[:0x900], *characters[0x900::199], *encoder._disputed()]
    divided = 0
    for one in sample:
        text = f"a{one}a1{one}1 {one} .{one}. {one}a {one}1\n{one}\n'{one} {one}{one}  {one}"
        words = encoder_of_words._divide(text)
        if words is not None:
            divided += 1
            pieces = SPLITS[name].pre_tokenize_str(text)
            assert words == [text[start:end] for _, (start, end) in pieces], hex(ord(one))
    assert divided > 2400


def test_known_words_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_KEPT_CHARACTERS", 100)
    description = _description(SPLITS["GPT-2"])
    ours, theirs = make_encoder(description, None, "uint16"), LibraryEncoder(description, "uint16")
    texts = [f"word{index}" * 3 for index in range(50)]
    for text in texts:
        assert ours.encode([text]) == theirs.encode([text])
        assert sum(map(len, ours._known)) <= 100


def test_what_is_not_known_is_left_to_the_library() -> None:
    for pre_tokenizer in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), BYTES]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(encoder._LLAMA3), "removed"), BYTES]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        BYTES,
    ):
        assert isinstance(make_encoder(_description(pre_tokenizer), None, "int32"), LibraryEncoder)
    content = json.loads(_description(SPLITS["GPT-2"]))
    content["pre_tokenizer"] = None
    assert isinstance(make_encoder(json.dumps(content), None, "int32"), LibraryEncoder)
    assert isinstance(make_encoder(_description(SPLITS["GPT-2"], normalizers.NFKC()), None, "int32"), LibraryEncoder)


def test_a_tokenizer_in_python_is_asked_itself() -> None:
    class InPython:
        is_fast = False

        def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
            assert options["add_special_tokens"] is False
            return {"input_ids": [[ord(character) for character in text] for text in texts]}

    assert tokenizer_json(InPython()) is None
    encoded = make_encoder(None, InPython(), "uint16").encode(["ab", ""])
    assert [np.frombuffer(ids, np.uint16).tolist() for ids in encoded] == [[97, 98], []]
