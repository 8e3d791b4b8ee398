"""Builds the tokenizer of a GGUF file from the file's keys."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nemo_pvs.checkpoints.gguf.file import GgufFile
from nemo_pvs.errors import UserError

_SPACE = "\u2581"  # SentencePiece's symbol for a space


class TokenType(IntEnum):
    """The values of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Split(NamedTuple):
    """How a pre-tokenizer named in ``tokenizer.ggml.pre`` splits text before any merge."""

    pattern: str | None
    """Regular expression of a piece; None for GPT-2's, which ByteLevel has built in."""
    digits: bool = False
    """Whether every digit is split off first."""
    nfc: bool = False
    """Whether text is first normalised to Unicode's form NFC."""
    ignore_merges: bool = False
    """Whether a piece that is a token stays whole, regardless of the merges."""
    add_bos: bool = False
    """Whether texts begin with the bos token if no key says so."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS_AND_BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS_AND_BLANKS}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS_AND_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS = {
    "gpt-2": _Split(None),
    "smollm": _Split(None, digits=True),
    "starcoder": _Split(None, digits=True),
    "refact": _Split(None, digits=True),
    "llama-bpe": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "smaug-bpe": _Split(_LLAMA3),
    "qwen2": _Split(_QWEN2, nfc=True),
    "tekken": _Split(_TEKKEN, ignore_merges=True, add_bos=True),
}


def build_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a GGUF file describes.

    Raises:
        UserError: the file has no tokenizer, one of an unsupported kind, or an inconsistent one.
    """
    kind = file.get("tokenizer.ggml.model", "")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"The tokenizer in {file.path} is of the kind {kind or '(none)'}; supported are gpt2 (byte-level BPE) and "
            "llama (SentencePiece), so use the model's Hugging Face folder."
        )
    vocabulary = _Vocabulary(file)
    try:
        if kind == "gpt2":
            split = _split(file)
            tokenizer = _byte_level(file, vocabulary, split)
            add_bos = split.add_bos
        else:
            tokenizer = _sentencepiece(file, vocabulary)
            add_bos = True
    except UserError:
        raise
    except Exception as error:  # the Rust library raises plain exceptions
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"The tokenizer in {file.path} is broken ({reason}); download the file again.") from error
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    special = {}
    for name, ggml_name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.get(f"tokenizer.ggml.{ggml_name}_token_id", defaults.get(ggml_name))
        special[name] = vocabulary.token_of(index)
    ends = {
        "bos": file.get("tokenizer.ggml.add_bos_token", add_bos),
        "eos": file.get("tokenizer.ggml.add_eos_token", False),
    }
    for name, wanted in ends.items():
        if wanted and special[name] is None:
            raise UserError(
                f"Texts for {file.path} should {'begin' if name == 'bos' else 'end'} with its {name} token, but it "
                "names none; convert the model to GGUF again."
            )
    _add_ends(tokenizer, *(special[name] if wanted else None for name, wanted in ends.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=file.get(f"{file.get('general.architecture')}.context_length"),
        chat_template=_chat_templates(file),
        **{f"{name}_token": token for name, token in special.items() if token is not None},
    )


class _Vocabulary:
    """The tokens by id, with the type of each."""

    def __init__(self, file: GgufFile) -> None:
        self.tokens: list[str] = file.get("tokenizer.ggml.tokens", [])
        self.types: list[int] = file.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(self.tokens))
        self._file = file
        if not self.tokens or len(self.types) != len(self.tokens):
            raise UserError(
                f"{file.path} has {len(self.tokens):,} tokens and types for {len(self.types):,}; download it again."
            )
        # Unused rows of the embedding have names like [PAD49160], which must not match any text.
        self.ids: dict[str, int] = {}
        used = 0
        for index, (token, type_) in enumerate(zip(self.tokens, self.types, strict=True)):
            if type_ != TokenType.UNUSED:
                self.ids[token] = index
                used += 1
        if len(self.ids) != used:
            raise UserError(f"{used - len(self.ids)} tokens of {file.path} occur twice; download it again.")

    def token_of(self, index: int | None) -> str | None:
        """Return the token with this id, or None if there is no id."""
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise UserError(
                f"{self._file.path} names the token {index}, but has {len(self.tokens):,} tokens; download it again."
            )
        return self.tokens[index]

    def of_type(self, *types: TokenType) -> list[str]:
        """Return the tokens of these types, in the order of their ids."""
        return [token for token, type_ in zip(self.tokens, self.types, strict=True) if type_ in types]


def _split(file: GgufFile) -> _Split:
    name = file.get("tokenizer.ggml.pre", "")
    if name not in PRE_TOKENIZERS:
        fault = f"splits text as {name} does" if name else "does not say how text is split (tokenizer.ggml.pre)"
        raise UserError(
            f"The tokenizer in {file.path} {fault}; supported are {', '.join(PRE_TOKENIZERS)}, so use the model's "
            "Hugging Face folder."
        )
    return PRE_TOKENIZERS[name]


def _byte_level(file: GgufFile, vocabulary: _Vocabulary, split: _Split) -> Tokenizer:
    """Return a BPE tokenizer over bytes, each of which is represented by a printable character."""
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", [])]
    # No unk_token: bytes missing from the vocabulary are dropped, as by the published tokenizer.json of these models.
    tokenizer = Tokenizer(BPE(vocabulary.ids, merges, ignore_merges=split.ignore_merges))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = []
    if split.digits:
        splits.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        splits.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, vocabulary)
    return tokenizer


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    """Return a BPE tokenizer over characters with a byte fallback, as in Llama 2's tokenizer.json."""
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if file.get(key, None):
            raise UserError(
                f"The tokenizer in {file.path} changes text before it splits it ({key}), which is not supported; use "
                "the model's Hugging Face folder."
            )
    unknown = vocabulary.token_of(file.get("tokenizer.ggml.unknown_token_id", 0))
    tokenizer = Tokenizer(
        BPE(vocabulary.ids, _merges(file, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    normalizer_steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    decoder_steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        normalizer_steps.insert(0, normalizers.Prepend(_SPACE))
        decoder_steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalizer_steps)
    tokenizer.decoder = decoders.Sequence(decoder_steps)
    _add_whole_tokens(tokenizer, vocabulary)
    return tokenizer


def _merges(file: GgufFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return every pair of tokens that merges into a token, best score first, in which order SentencePiece merges.

    It prefers the leftmost of equally good merges; for one token that is the pair with the longest left part.
    """
    scores = file.get("tokenizer.ggml.scores", [])
    if len(scores) != len(vocabulary.tokens):
        raise UserError(
            f"{file.path} has {len(scores):,} scores for {len(vocabulary.tokens):,} tokens; download it again."
        )
    ids = {token: vocabulary.ids[token] for token in vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED)}
    if len({scores[index] for index in ids.values()}) < 2:
        raise UserError(
            f"All tokens of {file.path} have the same score, which does not determine how text is split into tokens; "
            "use the model's Hugging Face folder."
        )
    ranked = []
    for token, index in ids.items():
        for position in range(1, len(token)):
            left, right = token[:position], token[position:]
            if left in ids and right in ids:
                ranked.append((-scores[index], -position, index, (left, right)))
    return [merge for *_, merge in sorted(ranked)]


def _add_whole_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Add the tokens that take no part in merges, control and user-defined ones, so that text can match them."""
    for token, type_ in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if type_ in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            special = type_ != TokenType.USER_DEFINED
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])


def _add_ends(tokenizer: Tokenizer, front: str | None, back: str | None) -> None:
    """Begin and end every text with these tokens, unless it is tokenised without special tokens."""
    ends = [token for token in (front, back) if token is not None]
    if not ends:
        return
    single, second = ["$A"], ["$B:1"]
    if front:
        single.insert(0, front)
        second.insert(0, f"{front}:1")
    if back:
        single.append(back)
        second.append(f"{back}:1")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + second,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*ends}],
    )


def _chat_templates(file: GgufFile) -> str | dict[str, str] | None:
    """Return the chat template, or all templates by name if there are several."""
    default = file.get("tokenizer.chat_template", None)
    named = {name: file.get(f"tokenizer.chat_template.{name}") for name in file.get("tokenizer.chat_templates", [])}
    if not named:
        return default
    return {**({"default": default} if default else {}), **named}
