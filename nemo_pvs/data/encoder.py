"""Encodes texts for token files: as the tokenizer itself would, but every distinct word only once.

Most tokenizers divide a text into words by a regular expression and encode each word by itself. Both take equally
long in the library ``tokenizers``, although texts repeat their words. ``WordEncoder`` divides the text by the same
expression in the module ``regex``, which is twice as fast, and looks words up in a dictionary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import regex
import tokenizers
from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEPT_CHARACTERS = 1 << 23
"""Characters of words in the dictionary, which then takes about 200 MB; it is emptied when there are more."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_KNOWN = (_GPT2, _LLAMA3, _QWEN2)
"""Expressions that mean the same in both engines, but for characters that only one of them knows."""
_EACH_DIGIT = r"\p{N}|\P{N}+"

_CLASSES = (r"\p{L}", r"\p{N}", r"\s")
_FOLDED = "\u017f"
"""The long s, which (?i:'s) matches or not, depending on the engine."""


class Encoder(Protocol):
    """Encodes texts without special tokens."""

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as the bytes of an array."""


def make_encoder(description: str | None, tokenizer: PreTrainedTokenizerBase | None, dtype: str) -> Encoder:
    """Return the fastest encoder for a tokenizer.

    Args:
        description: Its ``tokenizer.json`` (``tokenizer_json``); None if it has none.
        tokenizer: The tokenizer itself, if it has no description.
        dtype: NumPy's name of the type of the stored ids.
    """
    if description is None:
        assert tokenizer is not None
        return _SlowEncoder(tokenizer, dtype)
    expressions = _expressions(json.loads(description))
    if expressions is None:
        return LibraryEncoder(description, dtype)
    return WordEncoder(description, expressions, dtype)


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the content of ``tokenizer.json`` without truncation and padding; None for a tokenizer in Python."""
    if not tokenizer.is_fast:
        return None
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**content, "truncation": None, "padding": None}, ensure_ascii=False)


class _SlowEncoder:
    """A tokenizer that is written in Python."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as the bytes of an array."""
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, self._dtype).tobytes() for ids in encoded["input_ids"]]


class LibraryEncoder:
    """The library's own ``encode_batch``, without the offsets that nobody reads."""

    def __init__(self, description: str, dtype: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(description)
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as the bytes of an array."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype).tobytes() for encoding in encodings]


class WordEncoder:
    """Encodes every distinct word once.

    Texts with added tokens, which are found before words are, and with characters on which the Unicode tables of the
    two engines differ, are left to the library.
    """

    def __init__(self, description: str, expressions: Sequence[str], dtype: str) -> None:
        """``expressions`` divide a text into words, one after another."""
        content = json.loads(description)
        self._whole = LibraryEncoder(description, dtype)
        alone: dict[str, Any] = {
            "added_tokens": [],
            "normalizer": None,
            "post_processor": None,
            "pre_tokenizer": _BYTES,
        }
        self._words = LibraryEncoder(json.dumps({**content, **alone}, ensure_ascii=False), dtype)
        self._normalizer = tokenizers.Tokenizer.from_str(description).normalizer
        self._expressions = [regex.compile(expression) for expression in expressions]
        added = [re.escape(token["content"]) for token in content["added_tokens"]]
        self._exception = re.compile("|".join([*added, f"[{_disputed()}]"]))
        self._known: dict[str, bytes] = {}
        self._kept = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as the bytes of an array."""
        divided = [self._divide(text) for text in texts]
        new = {word for words in divided if words is not None for word in words if word not in self._known}
        self._learn(list(new))
        encoded = [b"" if words is None else b"".join(map(self._known.__getitem__, words)) for words in divided]
        left = [index for index, words in enumerate(divided) if words is None]
        for index, ids in zip(left, self._whole.encode([texts[index] for index in left]), strict=True):
            encoded[index] = ids
        if self._kept > _KEPT_CHARACTERS:
            self._known, self._kept = {}, 0
        return encoded

    def _divide(self, text: str) -> list[str] | None:
        """Return the words of a text; None if the library must find them."""
        if self._exception.search(text):
            return None
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
            if self._exception.search(text):
                return None
        words = [text]
        for expression in self._expressions:
            words = [word for piece in words for word in expression.findall(piece)]
        return words

    def _learn(self, words: list[str]) -> None:
        for word, ids in zip(words, self._words.encode(words), strict=True):
            self._known[word] = ids
            self._kept += len(word)


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _expressions(content: dict[str, Any]) -> list[str] | None:
    """Return the expressions by which a tokenizer divides texts into words; None if others than known ones."""
    if content["model"].get("dropout") or (content["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return None
    given = content["pre_tokenizer"] or {"type": None}
    steps = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    found = []
    for step in steps[:-1]:
        if step["type"] == "Digits" and step["individual_digits"]:
            found.append(_EACH_DIGIT)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex"))
        else:
            return None
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        found.append(_GPT2)
    return found if found and all(expression in (*_KNOWN, _EACH_DIGIT) for expression in found) else None


@cache
def _disputed() -> str:
    """Return the characters, for a class in ``re``, that only one of the engines takes for a letter, number or space.

    Those beyond the basic plane and emoji are rare, and not compared but included.
    """
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000), *range(0x1F000, 0x1FB00)]))
    disputed = set(_FOLDED)
    for name in _CLASSES:
        others = pre_tokenizers.Split(tokenizers.Regex(f"[^{name}]+"), "removed")
        theirs = "".join(piece for piece, _ in others.pre_tokenize_str(every))
        disputed |= set(theirs).symmetric_difference(regex.findall(name, every))
    between_letters = "a" + "a".join(every) + "a"
    pieces = [piece for piece, _ in pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(between_letters)]
    disputed |= set(pieces[1::2]).symmetric_difference(regex.findall(r"\p{N}", every))
    return re.escape("".join(sorted(disputed))) + "\U00010000-\U0001efff\U0001fb00-\U0010ffff"
