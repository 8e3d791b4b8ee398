"""The tokenizer of a GGUF file, made from the file's own keys."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nemo_pvs.checkpoints.gguf.file import GgufFile
from nemo_pvs.errors import UserError

_SPACE = "\u2581"  # what SentencePiece writes for a blank


class TokenType(IntEnum):
    """Kinds of tokens, as ``tokenizer.ggml.token_type`` has them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Split(NamedTuple):
    """How a name in ``tokenizer.ggml.pre`` cuts text before any merge."""

    pattern: str | None
    """What becomes a piece; None for GPT-2's expression, which ByteLevel has built in."""
    digits: bool = False
    """Whether every digit is cut out first."""
    nfc: bool = False
    """Whether text is brought into Unicode's form NFC first."""
    ignore_merges: bool = False
    """Whether a piece that is a token is taken whole, whatever the merges make of it."""
    add_bos: bool = False
    """Whether texts begin with the bos token if no key says it."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS_AND_BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS_AND_BLANKS}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS_AND_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLITS = {
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
        UserError: the file has no tokenizer, one of a kind that is not read, or one that contradicts itself.
    """
    kind = file.get("tokenizer.ggml.model", "")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"The tokenizer in {file.path} is of the kind {kind or '(none)'}; those that are read are gpt2 "
            "(byte-level BPE) and llama (SentencePiece). Use the model's Hugging Face folder."
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
    special = {
        ours: vocabulary.token_of(file.get(f"tokenizer.ggml.{theirs}_token_id", defaults.get(theirs)))
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
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
        # Rows of the embedding without a token have names like [PAD49160], which no text may match.
        self.ids = {
            token: index
            for index, (token, type_) in enumerate(zip(self.tokens, self.types, strict=True))
            if type_ != TokenType.UNUSED
        }
        used = sum(type_ != TokenType.UNUSED for type_ in self.types)
        if len(self.ids) != used:
            raise UserError(f"{used - len(self.ids)} tokens of {file.path} occur twice; download it again.")

    def token_of(self, index: int | None) -> str | None:
        """Return the token with an id, None for None."""
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise UserError(f"{self._file.path} names the token {index}, but has {len(self.tokens):,} tokens.")
        return self.tokens[index]

    def of_type(self, *types: TokenType) -> list[str]:
        """Return the tokens of some types, by id."""
        return [token for token, type_ in zip(self.tokens, self.types, strict=True) if type_ in types]


def _split(file: GgufFile) -> _Split:
    name = file.get("tokenizer.ggml.pre", "")
    if name not in _SPLITS:
        said = f"cuts text as {name} does" if name else "does not say how text is cut (tokenizer.ggml.pre)"
        raise UserError(
            f"The tokenizer in {file.path} {said}; those that are read are {', '.join(_SPLITS)}. Use the model's "
            "Hugging Face folder."
        )
    return _SPLITS[name]


def _byte_level(file: GgufFile, vocabulary: _Vocabulary, split: _Split) -> Tokenizer:
    """Return a BPE over bytes, each of which is written as a printable character."""
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", [])]
    # No unk_token: bytes that the vocabulary lacks vanish, as in the published tokenizer.json files of these models.
    tokenizer = Tokenizer(BPE(vocabulary.ids, merges, ignore_merges=split.ignore_merges))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts: list[Any] = []
    if split.digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        cuts.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, vocabulary)
    return tokenizer


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    """Return a BPE over characters with bytes for those that are no token, as Llama 2's tokenizer.json has it."""
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if file.get(key, None):
            raise UserError(
                f"The tokenizer in {file.path} changes text before it cuts it ({key}), which is not supported; use "
                "the model's Hugging Face folder."
            )
    unknown = vocabulary.token_of(file.get("tokenizer.ggml.unknown_token_id", 0))
    tokenizer = Tokenizer(
        BPE(vocabulary.ids, _merges(file, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    blanks: list[Any] = [normalizers.Replace(" ", _SPACE)]
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        blanks.insert(0, normalizers.Prepend(_SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(blanks)
    tokenizer.decoder = decoders.Sequence(back)
    _add_whole_tokens(tokenizer, vocabulary)
    return tokenizer


def _merges(file: GgufFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return every way to make a token of two, best score first, which is what SentencePiece merges by.

    It takes the leftmost of equally good merges; for one token that is the way with the longest left part.
    """
    scores = file.get("tokenizer.ggml.scores", [])
    if len(scores) != len(vocabulary.tokens):
        raise UserError(
            f"{file.path} has {len(scores):,} scores for {len(vocabulary.tokens):,} tokens; download it again."
        )
    ids = {token: vocabulary.ids[token] for token in vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED)}
    if len({scores[index] for index in ids.values()}) < 2:
        raise UserError(
            f"All tokens of {file.path} have the same score, which does not say how text is cut into them; use the "
            "model's Hugging Face folder."
        )
    ranked = []
    for token, index in ids.items():
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in ids and right in ids:
                ranked.append((-scores[index], -place, index, (left, right)))
    return [merge for *_, merge in sorted(ranked)]


def _add_whole_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Let the tokens that stand in no merge be found in text: control tokens, and those that a user has added."""
    for token, type_ in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if type_ in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            special = type_ != TokenType.USER_DEFINED
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])


def _add_ends(tokenizer: Tokenizer, front: str | None, back: str | None) -> None:
    """Have every text begin and end with these tokens, unless it is tokenised without special tokens."""
    ends = [token for token in (front, back) if token is not None]
    if not ends:
        return
    one = [*([front] if front else []), "$A", *([back] if back else [])]
    two = [*one, *([f"{front}:1"] if front else []), "$B:1", *([f"{back}:1"] if back else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=one, pair=two, special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*ends}]
    )


def _chat_templates(file: GgufFile) -> str | dict[str, str] | None:
    """Return the chat template, or all of them by name where there are several."""
    default = file.get("tokenizer.chat_template", None)
    named = {name: file.get(f"tokenizer.chat_template.{name}") for name in file.get("tokenizer.chat_templates", [])}
    if not named:
        return default
    return {**({"default": default} if default else {}), **named}
