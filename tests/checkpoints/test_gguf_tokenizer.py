"""Tokenizers of GGUF files: the ids that others publish, those of SentencePiece, or a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFWriter
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_pvs.checkpoints.fetch import packaged_smollm2
from nemo_pvs.checkpoints.gguf.file import GgufFile
from nemo_pvs.checkpoints.gguf.tokenizer import build_tokenizer
from nemo_pvs.errors import UserError
from tests.checkpoints.gguf_writer import BYTE_TOKENIZER, BYTES, add_key

NOUNS = ("house", "mouse", "boat", "bought", "naïve  idea", "abababab", "old    oak")
AWKWARD = "I'll say\r\n\r\n  x=12345 YOU'RE naïve 中文 e\u0301 😀!!!\t\tdef f(): # ½²\n   end  "


def tokenizer_of(path: Path, **keys: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file with these keys, those of a tokenizer of bytes where nothing is said."""
    writer = GGUFWriter(path / "x.gguf", "llama")
    add_key(writer, "llama.context_length", 256)
    for name, value in {**BYTE_TOKENIZER, **keys}.items():
        add_key(writer, f"tokenizer.{name}" if name.startswith("chat_template") else f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    build_tokenizer(GgufFile(path / "x.gguf")).save_pretrained(path / "x")
    return AutoTokenizer.from_pretrained(path / "x")


# Ids of Hugging Face's tokenizer.json of SmolLM2-135M, as the tests of several unrelated public implementations have
# them (tokenizers in Go, C++ and Rust that compare themselves with transformers); the package's GGUF file is another
# copy of the same vocabulary and merges.
PUBLISHED = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    " Paris.\n\nParis is the capital of France.\n": [
        *[7042, 30, 198, 198, 38634, 314, 260, 3575, 282, 4649, 30, 198],
    ],
    "<|im_start|>user\nHello, world! 2024\n<|im_end|>": [
        *[1, 4093, 198, 19556, 28, 905, 17, 216, 34, 32, 34, 36, 198, 2],
    ],
    "Tabs\tspaces  and\nnewlines": [68, 7366, 197, 41123, 216, 284, 198, 2241, 5110],
    "naïve café déjà vu": [3546, 46494, 37366, 32564, 90, 16739, 386, 101],
    'JSON: {"a": 1, "b": [2,3]}': [27936, 42, 9583, 81, 1799, 216, 33, 28, 476, 82, 1799, 933, 34, 28, 35, 28852],
    "We'll test CAN'T and won’t.": [1882, 3060, 1028, 27190, 23, 68, 284, 3763, 417, 100, 30],
    "emoji 😀😃 plus © and ™": [391, 33777, 40303, 218, 10813, 242, 221, 8055, 11435, 284, 4636, 222, 112],
    "CRLF\r\nline two": [9088, 60, 54, 201, 198, 1311, 827],
    "   leading and trailing   ": [256, 2899, 284, 35079, 333],
    "math: 3.14159 >= 2^10": [8898, 42, 216, 35, 30, 33, 36, 33, 37, 41, 10888, 216, 34, 78, 33, 32],
    "中文 mixed العربية": [28589, 29184, 6468, 27819, 34966, 20602, 31462, 23339, 43463],
    "x\n\n\ny": [104, 1116, 198, 105],
    "a\x04b\0c": [81, 82, 190, 83],  # the vocabulary has no token for the byte 4
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    build_tokenizer(GgufFile(packaged_smollm2())).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("text", PUBLISHED)
def test_smollm2_has_the_published_ids(smollm2, text):
    assert smollm2(text)["input_ids"] == PUBLISHED[text]


@pytest.mark.slow
def test_smollm2_has_the_special_tokens_and_the_template_of_its_file(smollm2):
    assert [smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id, smollm2.unk_token_id] == [1, 2, 2, 0]
    assert len(smollm2) == 49152
    chat = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.decode(smollm2(AWKWARD)["input_ids"]) == AWKWARD


# What each name makes of AWKWARD before any merge. The same code, given the whole vocabularies, has the ids that
# llama.cpp publishes for its 46 test texts (models/ggml-vocab-*.gguf.inp and .out: llama-bpe, qwen2, gpt-2, starcoder,
# refact), and those of tiktoken for 73 texts with the ranks and expressions of Llama 3, Qwen and Mistral's tekken.
PIECES = {
    "gpt-2": (
        *("I", "'ll", " say", "\r\n\r\n ", " x", "=", "12345", " YOU", "'", "RE", " naïve", " 中文", " e", "\u0301"),
        *(" 😀!!!", "\t", "\t", "def", " f", "():", " #", " ½²", "\n  ", " end", "  "),
    ),
    "smollm": (
        *("I", "'ll", " say", "\r\n\r\n ", " x", "=", "1", "2", "3", "4", "5", " YOU", "'", "RE", " naïve", " 中文"),
        *(" e", "\u0301", " 😀!!!", "\t", "\t", "def", " f", "():", " #", " ", "½", "²", "\n  ", " end", "  "),
    ),
    "llama-bpe": (
        *("I", "'ll", " say", "\r\n\r\n", " ", " x", "=", "123", "45", " YOU", "'RE", " naïve", " 中文", " e"),
        *("\u0301", " 😀!!!", "\t", "\tdef", " f", "():", " #", " ", "½²", "\n", "  ", " end", "  "),
    ),
    "qwen2": (
        *("I", "'ll", " say", "\r\n\r\n", " ", " x", "=", "1", "2", "3", "4", "5", " YOU", "'RE", " naïve", " 中文"),
        *(" é", " 😀!!!", "\t", "\tdef", " f", "():", " #", " ", "½", "²", "\n", "  ", " end", "  "),
    ),
    "tekken": (
        *("I", "'ll", " say", "\r\n\r\n", " ", " x", "=", "1", "2", "3", "4", "5", " YOU", "'RE", " naïve", " 中文"),
        *(" e\u0301", " 😀!!!", "\t", "\tdef", " f", "():", " #", " ", "½", "²", "\n", "  ", " end", "  "),
    ),
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_cut_as_the_name_of_the_pre_tokenizer_says(pre, tmp_path):
    backend = tokenizer_of(tmp_path, pre=pre, bos_token_id=256).backend_tokenizer
    text = backend.normalizer.normalize_str(AWKWARD) if backend.normalizer else AWKWARD
    byte_of = {character: byte for byte, character in enumerate(BYTES)}
    pieces = [bytes(map(byte_of.get, piece)).decode() for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert tuple(pieces) == PIECES[pre]


@pytest.mark.parametrize(("pre", "ids"), [("llama-bpe", [258]), ("smaug-bpe", [257, 99])])
def test_whole_pieces_go_before_merges_where_the_name_says_so(pre, ids, tmp_path):
    words = {"tokens": [*BYTES, "<|end|>", "ab", "abc"], "token_type": [1] * 256 + [3, 1, 1], "merges": ["a b"]}
    tokenizer = tokenizer_of(tmp_path, pre=pre, bos_token_id=256, **words)
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({"pre": "llama-bpe"}, [256, 97]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [97]),
        ({"pre": "qwen2"}, [97]),
        ({"pre": "qwen2", "add_bos_token": True, "add_eos_token": True}, [256, 97, 257]),
    ],
)
def test_texts_begin_and_end_as_the_keys_say(keys, ids, tmp_path):
    words = {"tokens": [*BYTES, "<|begin|>", "<|end|>"], "token_type": [1] * 256 + [3, 3]}
    tokenizer = tokenizer_of(tmp_path, **words, bos_token_id=256, eos_token_id=257, **keys)
    assert tokenizer("a")["input_ids"] == ids
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [97]


def test_kinds_of_tokens(tmp_path):
    tokens = [*BYTES, "<|end|>", "<tool>", "[PAD258]"]
    tokenizer = tokenizer_of(tmp_path, tokens=tokens, token_type=[1] * 256 + [3, 4, 5])
    assert tokenizer("a<tool><|end|>")["input_ids"] == [97, 257, 256]
    assert tokenizer.decode([97, 257, 256], skip_special_tokens=True) == "a<tool>"
    assert tokenizer("[PAD258]")["input_ids"] == [ord(character) for character in "[PAD258]"]


def test_several_chat_templates(tmp_path):
    templates = {"chat_template": "A", "chat_templates": ["tool_use"], "chat_template.tool_use": "B"}
    tokenizer = tokenizer_of(tmp_path, **templates)
    turns = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "A"
    assert tokenizer.apply_chat_template(turns, chat_template="tool_use", tokenize=False) == "B"


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A SentencePiece model like Llama 2's: BPE with bytes, a blank in front, every digit apart."""
    folder = tmp_path_factory.mktemp("spm")
    text = folder / "text"
    lines = [f"In {year} the {kind} of   {year + 5} was bought.    " for year in range(1980, 2020) for kind in NOUNS]
    text.write_text("\n".join(lines))
    settings = {"model_type": "bpe", "vocab_size": 370, "byte_fallback": True, "split_digits": True}
    blanks = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spm"),
        normalization_rule_name="identity",
        minloglevel=2,
        **settings,
        **blanks,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))


def of_spm(spm: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Return the keys that llama.cpp's converter makes of a SentencePiece model."""
    ids = range(spm.vocab_size())
    types = [
        2 if spm.is_unknown(index) else 3 if spm.is_control(index) else 6 if spm.is_byte(index) else 1 for index in ids
    ]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [spm.id_to_piece(index) for index in ids],
        "token_type": types,
        "scores": [spm.get_score(index) for index in ids],
        "eos_token_id": 2,
    }


def test_a_sentencepiece_vocabulary_has_the_ids_of_sentencepiece(spm, tmp_path):
    tokenizer = tokenizer_of(tmp_path, **of_spm(spm))
    texts = [AWKWARD, "In 1999 the boat", " a  b ", *("x" + " " * run + "end" for run in range(40)), "ab" * 20, ""]
    assert max(len(ids) for ids in map(spm.encode, texts)) < len(AWKWARD.encode())  # merges and bytes are both used
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == spm.encode(text), text
        assert tokenizer(text)["input_ids"] == [1, *spm.encode(text)]
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def leftmost_of_the_best(text: str, scores: dict[str, float]) -> list[str]:
    """Merge as SentencePiece does: again and again the neighbours that make the best token, the leftmost of equals."""
    pieces = list(text)
    while True:
        pairs = [pieces[place] + pieces[place + 1] for place in range(len(pieces) - 1)]
        possible = [place for place, pair in enumerate(pairs) if pair in scores]
        if not possible:
            return pieces
        best = max(possible, key=lambda place: (scores[pairs[place]], -place))
        pieces[best : best + 2] = [pairs[best]]


def test_of_equally_good_merges_the_leftmost_is_made(tmp_path):
    # Runs of blanks in Mistral 7B's tokenizer: all have one score, and none is 15 long.
    runs = {"\u2581" * length: -1e9 for length in (1, 2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11)}
    scores = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, "x": -1.0, **runs}
    keys = {"tokens": [*scores], "scores": [*scores.values()], "token_type": [2, 3, 3] + [1] * (len(scores) - 3)}
    tokenizer = tokenizer_of(tmp_path, model="llama", add_space_prefix=False, eos_token_id=2, **keys)
    for length in range(40):
        expected = leftmost_of_the_best("x" + "\u2581" * length + "x", scores)
        assert tokenizer.tokenize("x" + " " * length + "x") == expected, length


def test_no_blank_in_front_where_the_key_says_so(spm, tmp_path):
    tokenizer = tokenizer_of(tmp_path, **of_spm(spm), add_space_prefix=False)
    assert tokenizer(" the boat")["input_ids"] == [1, *spm.encode("the boat")]
    assert tokenizer.decode(tokenizer("the boat")["input_ids"], skip_special_tokens=True) == "the boat"


REFUSED = {
    "splits text as deepseek-llm does; supported are gpt-2, smollm": {"pre": "deepseek-llm"},
    "does not say how text is split": {"pre": None},
    "is of the kind bert": {"model": "bert"},
    r"is of the kind \(none\)": {"model": None},
    "has 257 tokens and types for 3; download it again": {"token_type": [1, 1, 1]},
    "1 tokens of .* occur twice": {"tokens": [*BYTES, "a"]},
    "names the token 900, but has 257 tokens": {"eos_token_id": 900},
    "add_bos_token in .* is 'yes'": {"add_bos_token": "yes"},
    "is broken": {"merges": ["a b"]},  # there is no token ab
    "has 0 scores for 257 tokens": {"model": "llama"},
    "All tokens of .* have the same score": {"model": "llama", "scores": [-1000.0] * 257},
    "changes text before it splits it": {"model": "llama", "remove_extra_whitespaces": True},
    "should begin with its bos token, but it names none": {"pre": "llama-bpe"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_understood_is_refused(said, tmp_path):
    with pytest.raises(UserError, match=said):
        tokenizer_of(tmp_path, **REFUSED[said])
