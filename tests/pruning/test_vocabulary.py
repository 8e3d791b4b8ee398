"""Vocabulary pruning: every text comes back, kept words keep their tokens, and kept tokens their rows and logits."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nemo_pvs.api.prune import prune
from nemo_pvs.checkpoints.gguf.file import GgufFile
from nemo_pvs.checkpoints.gguf.tokenizer import build_tokenizer
from nemo_pvs.checkpoints.gguf.write import write_gguf
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.data.corpus import Document
from nemo_pvs.data.token_counts import counts_of_documents, counts_of_token_file
from nemo_pvs.data.token_files import describe_token_file
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash, write_token_file
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.result import PLAN
from nemo_pvs.pruning.vocabulary.choice import choose_tokens
from nemo_pvs.pruning.vocabulary.files import new_ids, pruned_tokenizer
from nemo_pvs.pruning.vocabulary.tokenizer import BpeTokenizer, byte_characters
from tests.conftest import Outcome, make_tiny_llama

ROWS, VOCAB = 640, 600
"""Rows of the embedding and tokens; the rows beyond are padding."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '\\nwonderful' }}{{ m['content'] }}<|im_end|>{% endfor %}"
)
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

choose = random.Random(0)
STEMS = ["prun", "train", "token", "layer", "scratch", "wonder", "model", "vocabular", "méth", "größ"]
ENDINGS = ["", "s", "ing", "ed", "er", "ers", "ful", "less", "ization", "é"]
WORDS = [stem + ending for stem in STEMS for ending in ENDINGS]
TEXT = " ".join(choose.choice(WORDS) + choose.choice(["", ",", ".\n", " 1999", " 42"]) for _ in range(4000))
COMMON = " ".join(word for word in WORDS[:35] for _ in range(9))


def byte_level(*, words: bool = False, digits: bool = False) -> Tokenizer:
    """Return a byte-level BPE tokenizer, trained on TEXT; with ``words`` whole words come first, as in Llama 3."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if words:
        steps.append(pre_tokenizers.Split(Regex(LLAMA3), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]),
    ])  # fmt: skip
    return tokenizer


def characters() -> Tokenizer:
    """Return BPE over characters with a byte fallback, as in Llama 2, trained on TEXT."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # only for training
    byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", *SPECIAL, *byte_names], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "digits": lambda: byte_level(digits=True),
    "whole words": lambda: byte_level(words=True),
    "characters": characters,
}


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


class Pair:
    """A tokenizer before and after pruning to a size that has room for the tokens of COMMON and for few others."""

    def __init__(self, folder: Path) -> None:
        self.parsed = BpeTokenizer(sorted(folder.iterdir()), {"vocab_size": ROWS})
        self.old = Tokenizer.from_file(str(folder / "tokenizer.json"))
        counts = torch.bincount(torch.tensor(self.old.encode(COMMON, add_special_tokens=False).ids), minlength=ROWS)
        self.size = len(self.parsed.required) + 60
        self.kept = choose_tokens(self.parsed, counts, self.size)
        self.new = self.with_tokens(self.kept)

    def with_tokens(self, kept: tuple[int, ...]) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(pruned_tokenizer(self.parsed, new_ids(kept))))

    def changed(self, new: Tokenizer, kept: tuple[int, ...], texts: list[str]) -> tuple[int, int]:
        """Return how many texts have only kept tokens, and how many of these have other tokens now."""
        ids, same, others = new_ids(kept), 0, 0
        for text in texts:
            before = self.old.encode(text, add_special_tokens=False).ids
            if ids.keys() >= {*before}:
                same += 1
                others += [ids[index] for index in before] != new.encode(text, add_special_tokens=False).ids
        return same, others


@pytest.fixture(name="pairs", scope="module")
def pairs_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    pairs = {}
    for kind, make in KINDS.items():
        pairs[kind] = Pair(save(tmp_path_factory.mktemp("tokenizer"), make()))
    return pairs


AWKWARD = st.text() | st.lists(
    st.sampled_from(
        [*WORDS, " ", "\n", "  ", "<|im_end|>", "<tool>", "<|im_st", "'s", "12", "½", "你好", "🙂", "\x00"]
    )
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=AWKWARD)
def test_every_text_comes_back_as_before(kind: str, pairs: dict[str, Pair], text: str) -> None:
    pair = pairs[kind]
    old, new = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (pair.old, pair.new))
    assert pair.new.decode(new.ids, skip_special_tokens=False) == pair.old.decode(old.ids, skip_special_tokens=False)
    assert "".join(new.tokens) == "".join(old.tokens) or kind == "characters"  # where a character becomes bytes
    same, others = pair.changed(pair.new, pair.kept, [text])
    assert not others, same


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_kept_tokens_keep_their_tokens(kind: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[kind]
    words = [start + word + end for word in WORDS for start in ("", " ", "un", " re") for end in ("", "s", "ers")]
    same, others = pair.changed(pair.new, pair.kept, words)
    assert same > 20
    assert same < len(words)  # others have a removed token
    assert others == 0
    # The tokens of the text alone, without their derivations, are not enough.
    kept = tuple(sorted(pair.parsed.required.union(pair.old.encode(COMMON, add_special_tokens=False).ids)))
    assert pair.changed(pair.with_tokens(kept), kept, words)[1] > 0


def test_frequent_tokens_stay_and_the_size_is_exact(pairs: dict[str, Pair]) -> None:
    for pair in pairs.values():
        assert len(pair.kept) == pair.new.get_vocab_size() == pair.size
        for index in new_ids(pair.kept).items():
            assert pair.old.id_to_token(index[0]) == pair.new.id_to_token(index[1])
        assert pair.parsed.required <= {*pair.kept}
        counts = Counter(pair.old.encode(COMMON, add_special_tokens=False).ids)
        assert {*sorted(counts, key=lambda index: (-counts[index], index))[:5]} <= {*pair.kept}


def test_all_sizes_are_reached(pairs: dict[str, Pair]) -> None:
    for pair in pairs.values():
        counts = torch.zeros(ROWS, dtype=torch.int64)
        for size in (len(pair.parsed.required), 512, VOCAB, VOCAB + 1, ROWS - 1, ROWS):
            assert len(choose_tokens(pair.parsed, counts, size)) == size


def test_bytes_special_tokens_and_those_of_the_template_are_required(pairs: dict[str, Pair]) -> None:
    pair = pairs["byte-level"]
    names = {pair.old.id_to_token(index) for index in pair.parsed.required}
    assert {*byte_characters(), *SPECIAL, "<tool>"} <= names
    assert {*pair.old.encode("\nwonderful", add_special_tokens=False).tokens} <= names
    assert byte_characters() == {*pre_tokenizers.ByteLevel.alphabet()}


def test_a_template_that_jinja_cannot_read_and_padding_by_any_token(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    (folder / "chat_template.jinja").write_text(r"{{ 'wonderful' + '\x' }}")
    content = json.loads((folder / "tokenizer.json").read_text())
    rare = max(content["model"]["vocab"].values())
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = {**padding, "pad_id": rare, "pad_type_id": 0, "pad_token": "[PAD]"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    parsed = BpeTokenizer(sorted(folder.iterdir()), {"vocab_size": ROWS})
    kept = sorted(parsed.required)
    assert pruned_tokenizer(parsed, new_ids(kept))["padding"]["pad_id"] == kept.index(rare)


@pytest.fixture(name="parent", scope="module")
def parent_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("parent"), byte_level())
    tool = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<tool>")
    make_tiny_llama(folder, vocab_size=ROWS, bos_token_id=1, eos_token_id=[2, tool], pad_token_id=0)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(vocab["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, vocab["merges"])) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": tool}))
    (folder / "tokenizer.model").write_bytes(b"the same in another format")
    rare = tool - 1
    generation = {
        "eos_token_id": [2, tool],
        "pad_token_id": 0,
        "suppress_tokens": [5, rare],
        "bad_words_ids": [[rare]],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "text.txt").write_text(COMMON)
    return folder


@pytest.fixture(name="small", scope="module")
def small_fixture(parent: Path) -> Path:
    folder = parent / "small"
    prune(parent, folder, "vocabulary", target="vocab=400", data=parent / "text.txt")
    return folder


def logits_of(folder: Path, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[-1][0], output.logits[0]


def test_kept_tokens_have_the_same_states_and_logits(parent: Path, small: Path) -> None:
    plan = Plan.load(small / PLAN)
    assert (plan.method, plan.target) == ("vocabulary", plan.parent.replace(vocab=400))
    assert plan.keep_vocab is not None
    old, new = AutoTokenizer.from_pretrained(parent), AutoTokenizer.from_pretrained(small)
    text = f" {COMMON[:200]}"
    before, after = old(text)["input_ids"], new(text)["input_ids"]
    assert before == [plan.keep_vocab[index] for index in after]
    hidden, logits = logits_of(parent, before)
    states, ours = logits_of(small, after)
    assert torch.equal(hidden, states)
    torch.testing.assert_close(ours, logits[:, list(plan.keep_vocab)], rtol=1e-6, atol=1e-7)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = HuggingFaceSource(parent).read(name)[list(plan.keep_vocab)]
        assert torch.equal(HuggingFaceSource(small).read(name), rows)


def test_ids_are_moved_in_every_file(parent: Path, small: Path) -> None:
    old, new = AutoTokenizer.from_pretrained(parent), AutoTokenizer.from_pretrained(small)
    assert (new.bos_token, new.eos_token, new.pad_token, len(new)) == (*SPECIAL[1:], SPECIAL[0], 400)
    tool = new.convert_tokens_to_ids("<tool>")
    assert tool < 400
    config = json.loads((small / "config.json").read_text())
    expected = {"bos_token_id": 1, "eos_token_id": [2, tool], "pad_token_id": 0, "vocab_size": 400}
    assert {key: config[key] for key in expected} == expected
    generation = json.loads((small / "generation_config.json").read_text())
    assert generation == {**generation, "eos_token_id": [2, tool], "suppress_tokens": [5], "bad_words_ids": []}
    talk = [{"role": "user", "content": "train the model"}]
    said, saying = (tokenizer.apply_chat_template(talk, tokenize=True) for tokenizer in (old, new))
    assert old.decode(said) == new.decode(saying)
    assert new.convert_ids_to_tokens(saying)[0] == "<|im_start|>"
    content = json.loads((small / "tokenizer.json").read_text())
    assert json.loads((small / "vocab.json").read_text()) == content["model"]["vocab"]
    assert (small / "merges.txt").read_text().splitlines()[1:] == [
        " ".join(pair) for pair in content["model"]["merges"]
    ]
    assert json.loads((small / "added_tokens.json").read_text()) == {"<tool>": tool}
    assert not (small / "tokenizer.model").exists()


def test_from_and_to_nemo(parent: Path, small: Path, tmp_path: Path) -> None:
    write_nemo(HuggingFaceSource(parent), tmp_path / "nemo")
    made = prune(tmp_path / "nemo", tmp_path / "small", "vocabulary", target="vocab=400", data=parent / "text.txt")
    assert made.shape.vocab == 400
    source = NemoSource(tmp_path / "small")
    assert tokenizer_hash(tmp_path / "small" / "context" / "tokenizer") == tokenizer_hash(small)
    assert source.config["eos_token_id"] == json.loads((small / "config.json").read_text())["eos_token_id"]
    name = "model.embed_tokens.weight"
    assert torch.equal(source.read(name), HuggingFaceSource(small).read(name))


def test_a_gguf_file_has_the_kept_tokens(small: Path, tmp_path: Path) -> None:
    write_gguf(HuggingFaceSource(small), tmp_path / "small.gguf", dtype="f32")
    tokenizer, theirs = load_tokenizer(small), build_tokenizer(GgufFile(tmp_path / "small.gguf"))
    for text in (TEXT[:300], "<|im_start|>wonderful<tool>\n 42"):
        assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_together_with_a_width(parent: Path, small: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": parent / "text.txt", "samples": 4, "sequence_length": 16}
    wide = prune(parent, tmp_path / "width", "minitron-width", target="ffn=64", **settings).plan
    both = prune(parent, tmp_path / "both", "minitron-width", target="ffn=64,vocab=400", **settings)
    assert both.plan is not None
    assert wide is not None
    assert both.plan.keep_ffn == wide.keep_ffn
    assert both.plan.keep_vocab == Plan.load(small / PLAN).keep_vocab
    assert (both.shape.ffn, both.shape.vocab) == (64, 400)
    assert tokenizer_hash(tmp_path / "both") == tokenizer_hash(small)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(
        HuggingFaceSource(tmp_path / "both").read(name), HuggingFaceSource(tmp_path / "width").read(name)
    )


def test_together_with_units_of_a_ratio(parent: Path, small: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": parent / "text.txt", "samples": 4, "sequence_length": 16, "ratio": 0.3}
    alone = prune(parent, tmp_path / "alone", "flap", **settings).plan
    both = prune(parent, tmp_path / "both", "flap", target="vocab=400", **settings)
    assert both.plan is not None
    assert alone is not None
    assert (both.plan.keep_ffn, both.plan.keep_kv_groups) == (alone.keep_ffn, alone.keep_kv_groups)
    assert both.plan.keep_vocab == Plan.load(small / PLAN).keep_vocab
    assert both.shape == alone.target.replace(vocab=400)


def test_counts_of_a_token_file_are_those_of_its_text(parent: Path, small: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(parent)
    texts = [TEXT[:5000], COMMON]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    write_token_file(tmp_path / "text", ids, ROWS)
    counts = counts_of_documents([Document(text, "") for text in texts], tokenizer, ROWS)
    assert torch.equal(counts_of_token_file(tmp_path / "text", ROWS), counts)
    assert int(counts.sum()) == sum(map(len, ids))
    (tmp_path / "text.json").write_text(json.dumps({"tokenizer_sha256": tokenizer_hash(parent)}))
    made = prune(parent, tmp_path / "made", "vocabulary", target="vocab=400", data=tmp_path / "text.bin")
    assert made.plan is not None
    assert made.plan.provenance["vocabulary"]["tokens"] == int(counts.sum())
    with pytest.raises(UserError, match="made with another tokenizer"):
        describe_token_file(tmp_path / "text", tokenizer_hash(small), 400)


def test_what_cannot_be_pruned_is_refused(parent: Path, tmp_path: Path, pvs: Callable[..., Outcome]) -> None:
    def refused(source: Path, target: str) -> str:
        arguments = ("--method", "vocabulary", "--target", target, "--data", parent / "text.txt")
        outcome = pvs("prune", source, tmp_path / "out", *arguments)
        assert outcome.code == 2, outcome
        assert not (tmp_path / "out").exists()
        return " ".join(outcome.errors.split())

    assert "cannot hold the" in refused(parent, "vocab=200")
    assert "the model has 640; pruning only removes" in refused(parent, "vocab=700")
    assert "vocabulary does not change hidden; the sizes that it changes are vocab." in refused(parent, "hidden=32")
    other = tmp_path / "other"
    shutil.copytree(parent, other, ignore=shutil.ignore_patterns("small"))
    content = json.loads((parent / "tokenizer.json").read_text())
    for change, message in (
        ({"type": "Unigram"}, "is Unigram"),
        ({"dropout": 0.1}, "has dropout"),
    ):
        (other / "tokenizer.json").write_text(json.dumps({**content, "model": {**content["model"], **change}}))
        assert message in refused(other, "vocab=400")
    (other / "tokenizer.json").write_text(json.dumps({**content, "pre_tokenizer": {"type": "Whitespace"}}))
    assert "is BPE without bytes" in refused(other, "vocab=400")
    (other / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    assert "is not a tokenizer" in refused(other, "vocab=400")
    (other / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(other, "vocab=400")
    (other / "tokenizer.json").write_text(json.dumps(content))
    for file in ("config.json", "generation_config.json"):
        before = (other / file).read_text()
        (other / file).write_text(json.dumps({**json.loads(before), "sequence_bias": [[[5], 1.0]]}))
        message = f"{file} has sequence_bias, whose tokens cannot be renumbered; remove the key."
        assert refused(other, "vocab=400") == f"pvs: {message}"
        (other / file).write_text(before)
