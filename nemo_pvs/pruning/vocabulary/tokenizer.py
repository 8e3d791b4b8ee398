"""A BPE tokenizer as its files describe it: tokens, merges, and the tokens that BPE needs on the way to each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from tokenizers import Tokenizer

from nemo_pvs.data.tokenizer_config import TOKENIZER_CONFIG
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json

TOKENIZER = "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"

_BYTE_NAMES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""SentencePiece's names of the bytes, to which it falls back."""

_TEXTS = ("data", "string")
"""What Jinja calls the texts in a template: those outside and those inside of its expressions."""


def byte_characters() -> frozenset[str]:
    """Return the 256 characters that stand for the bytes in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return frozenset([*map(chr, printable), *(chr(256 + index) for index in range(others))])


class BpeTokenizer:
    """The tokenizer of a model: byte-level BPE, or BPE over characters with a byte fallback as in Llama 2."""

    def __init__(self, assets: Iterable[Path], config: Mapping[str, Any]) -> None:
        """Read a tokenizer's files.

        Args:
            assets: The model's files other than its weights.
            config: The model's ``config.json``, which also names tokens by their ids.

        Raises:
            UserError: there is no ``tokenizer.json``, it is not of a supported kind, or it has more tokens than the
                model.
        """
        self.files = {asset.name: asset for asset in assets}
        self.templates = [asset for asset in self.files.values() if asset.suffix == ".jinja"]
        if TOKENIZER not in self.files:
            raise UserError(
                "The model has no tokenizer.json, which vocabulary pruning rewrites; load its tokenizer with "
                "transformers' AutoTokenizer and save it next to the model."
            )
        self.path = self.files[TOKENIZER]
        self.content: dict[str, Any] = read_json(self.path)
        self._config = config
        self._encoder = self._open()
        self.vocab: dict[str, int] = self.model["vocab"]
        self.added = {int(token["id"]) for token in self.content.get("added_tokens", [])}
        decoder = self.optional(TOKENIZER_CONFIG).get("added_tokens_decoder", {})
        try:
            self.added.update(int(index) for index in decoder)
        except (TypeError, ValueError):
            raise UserError(
                f"added_tokens_decoder in {self.files[TOKENIZER_CONFIG]} does not map ids to tokens; restore the file."
            ) from None
        largest = max([*self.vocab.values(), *self.added])
        if largest >= config["vocab_size"]:
            raise UserError(
                f"The tokenizer in {self.path} has a token {largest}, but the embedding has {config['vocab_size']:,} "
                "rows; use the tokenizer that belongs to the model."
            )
        self._rank = {pair: rank for rank, pair in reversed([*enumerate(self.merges)])}  # the first of equal ones

    @property
    def model(self) -> dict[str, Any]:
        """The part of ``tokenizer.json`` with vocabulary and merges."""
        return self.content["model"]

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The merges in order; old files store them as texts with a space."""
        pairs = []
        for merge in self.model["merges"]:
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            pairs.append((left, right))
        return pairs

    @property
    def whole_words(self) -> bool:
        """Whether a word that is a token stays whole, whatever the merges (Llama 3's ``ignore_merges``)."""
        return bool(self.model.get("ignore_merges"))

    def optional(self, name: str) -> dict[str, Any]:
        """Return one of the tokenizer's JSON files; an empty dictionary if the model does not have it."""
        values = read_json(self.files[name]) if name in self.files else {}
        return values if isinstance(values, dict) else {}

    def closure(self, token: str) -> frozenset[int] | None:
        """Return the ids of a token and of all that BPE merges on the way to it from single characters.

        Returns:
            None if no text is encoded to the token.
        """
        parts = list(token)
        made = {token, *parts}
        while len(parts) > 1:
            ranks = [self._rank.get(pair, len(self._rank)) for pair in pairwise(parts)]
            best = min(ranks)
            if best == len(self._rank):
                break
            left = ranks.index(best)  # the leftmost of equal ones
            parts[left : left + 2] = [parts[left] + parts[left + 1]]
            made.add(parts[left])
        if len(parts) == 1 and made <= self.vocab.keys():
            return frozenset(self.vocab[part] for part in made)
        return frozenset([self.vocab[token]]) if self.whole_words else None

    @cached_property
    def required(self) -> frozenset[int]:
        """The ids that every text or chat may need: bytes, added and special tokens, those of chat templates.

        Rows of the embedding that a config names stay even if they have no token.
        """
        kept = {*self.added, *self._named_ids(), *self._bytes()}
        for name in self._named_tokens():
            if name in self.vocab:
                kept.add(self.vocab[name])
        for text in self._template_texts():
            for token in self._encoder.encode(text, add_special_tokens=False).tokens:
                if token in self.vocab:
                    kept.update(self.closure(token) or ())
        return frozenset(kept)

    def _bytes(self) -> Iterator[int]:
        """Yield the ids without which some text could not be encoded that can be now."""
        names = byte_characters() if _is_byte_level(self.content) else _BYTE_NAMES
        yield from (self.vocab[name] for name in names if name in self.vocab)
        if self.whole_words:
            # A word may be a token although one of its bytes is not.
            for token, index in self.vocab.items():
                if any(character not in self.vocab for character in token):
                    yield index

    def _named_ids(self) -> Iterator[int]:
        """Yield the ids that configs, and the tokenizer's own padding, name."""
        if self.content.get("padding"):
            yield self.content["padding"]["pad_id"]
        for values in (self._config, self.optional(GENERATION_CONFIG), self.optional(TOKENIZER_CONFIG)):
            for key, value in values.items():
                if key.endswith(("_token_id", "_token_ids")):
                    for index in value if isinstance(value, list) else [value]:
                        if isinstance(index, int) and 0 <= index < self._config["vocab_size"]:
                            yield index

    def _named_tokens(self) -> Iterator[str]:
        """Yield the texts of special tokens."""
        if self.model.get("unk_token"):
            yield self.model["unk_token"]
        for processor in post_processors(self.content):
            for special in processor.get("special_tokens", {}).values():
                yield from special["tokens"]
            yield from (processor[key][0] for key in ("sep", "cls") if key in processor)
        for values in (self.optional(TOKENIZER_CONFIG), self.optional(SPECIAL_TOKENS)):
            for key, value in values.items():
                if key.endswith(("_token", "_tokens")):
                    several = isinstance(value, list)
                    for token in value if several else [value]:
                        content = token.get("content") if isinstance(token, dict) else token
                        if isinstance(content, str):
                            yield content

    def _template_texts(self) -> Iterator[str]:
        """Yield the literal texts in the chat templates, which are read and not executed."""
        for template in self._templates():
            try:
                lexed = [*Environment(trim_blocks=True, lstrip_blocks=True).lex(template)]
                texts = [_unquoted(text) if kind == "string" else text for _, kind, text in lexed if kind in _TEXTS]
            except (TemplateSyntaxError, UnicodeDecodeError):
                continue  # transformers cannot use it either
            yield from texts

    def _templates(self) -> Iterator[str]:
        for values in (self.optional(TOKENIZER_CONFIG), self.optional("chat_template.json")):
            template = values.get("chat_template")
            if isinstance(template, str):
                yield template
            elif isinstance(template, list):
                yield from (named["template"] for named in template)
        for file in self.templates:
            yield file.read_text(encoding="utf-8")

    def _open(self) -> Tokenizer:
        """Open the tokenizer, which checks the structure of its file, and refuse kinds that are not supported."""
        model = self.content.get("model") if isinstance(self.content, dict) else None
        if not isinstance(model, dict):
            raise UserError(f"{self.path} is not a tokenizer; download it again.")
        kind = model.get("type", "BPE" if "merges" in model else "of an unknown kind")  # old files have no type
        if kind != "BPE":
            raise self._unsupported(f"is {kind}")
        try:
            encoder = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the Rust library raises plain exceptions
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{self.path} is not a tokenizer ({reason}); download it again.") from error
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise self._unsupported(f"has {key}")
        if not _is_byte_level(self.content) and not model.get("byte_fallback"):
            raise self._unsupported("is BPE without bytes")
        return encoder

    def _unsupported(self, fault: str) -> UserError:
        return UserError(
            f"The tokenizer in {self.path} {fault}; only vocabularies of BPE over bytes, or over characters with a "
            "byte fallback, can be pruned."
        )


def _unquoted(string: str) -> str:
    """Return the text of a string in a template, as Jinja reads it."""
    return string[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")


def post_processors(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the post-processors of a ``tokenizer.json``, also those in a sequence."""
    waiting = [content.get("post_processor")]
    while waiting:
        processor = waiting.pop()
        if processor:
            yield processor
            waiting += processor.get("processors", [])


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    """Return whether a ``tokenizer.json`` splits text into bytes."""
    splitting = content.get("pre_tokenizer") or {}
    return any(step["type"] == "ByteLevel" for step in splitting.get("pretokenizers", [splitting]) if step)
