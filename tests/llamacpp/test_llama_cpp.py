"""llama.cpp computes what Transformers computes: token ids, logits, perplexity and greedy text of our GGUF files."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import nemo_pvs as pvs
import nemo_pvs.checkpoints.gguf.write as writer
import nemo_pvs.modeling  # layers of different sizes in Transformers
from nemo_pvs.checkpoints.gguf.file import GgufFile
from nemo_pvs.data.wikipedia import sample_articles
from tests.checkpoints.gguf_writer import BYTES, MERGING_TOKENIZER
from tests.checkpoints.test_gguf_model import llama, qwen
from tests.checkpoints.test_gguf_tokenizer import AWKWARD, PUBLISHED, of_spm, spm, tokenizer_of  # noqa: F401
from tests.checkpoints.test_gguf_write import MODELS, edit, metaspace, mistral, saved
from tests.llamacpp.engine import Engine
from tests.uneven_model import LLAMA3_ROPE, make_uneven

pytestmark = pytest.mark.llamacpp
IDS = (torch.arange(2, 202) * 7 % 256).tolist()
TEXTS = (
    *PUBLISHED,
    AWKWARD,
    "",
    "I'm, you're, he'LL don't 's",
    "日本語のテキスト 한국어 ไทย हिन्दी العربية",
    "!!!???...~~~```''''",
)


def uneven(folder: Path, **settings: Any) -> Path:
    make_uneven(folder, vocab_size=260, **settings)
    tokenizer_of(folder.parent, **MERGING_TOKENIZER).save_pretrained(folder)
    return folder


SMALL: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, make=make: saved(folder, make()) for name, (make, _) in MODELS.items()},
    "mistral": lambda folder: saved(folder, mistral(sliding_window=256)),
    "qwen2 whose heads are wider": lambda folder: saved(folder, qwen(Qwen2Config, head_dim=32)),
    "uneven": lambda folder: uneven(folder),
    "uneven with biases": lambda folder: uneven(folder, attention_bias=True, mlp_bias=True),
    "uneven mistral": lambda folder: uneven(folder, family="mistral", sliding_window=256),
    "uneven qwen2": lambda folder: uneven(folder, family="qwen2"),
    "uneven llama 3.2": lambda folder: uneven(folder, rope_scaling=LLAMA3_ROPE),
}


def difference(folder: Path, file: Path) -> float:
    """Return the largest difference of the logits, relative to the largest logit."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    return float(np.abs(Engine(file, 256).logits(IDS) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", SMALL)
def test_logits_of_every_family(case: str, tmp_path: Path) -> None:
    folder = SMALL[case](tmp_path / "model")
    pvs.convert(folder, tmp_path / "model.gguf", dtype="f32")
    assert difference(folder, tmp_path / "model.gguf") < 2e-4


def merging_across_blanks(texts: Sequence[str]) -> dict[str, Any]:
    """Return a byte-level tokenizer that merges whatever is not split first, so that its ids depend on the splits.

    One token, the word of the last text, is made by no merge: it is a token only where whole pieces go before merges.
    """
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.ByteLevel()
    trainer = BpeTrainer(vocab_size=1000, initial_alphabet=BYTES, max_token_length=4, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    words = ["".join(merge) for merge in merges]
    whole = normalizers.ByteLevel().normalize_str(texts[-1])
    tokens = [*BYTES, "<|end|>", *dict.fromkeys(words), whole]
    return {
        "tokens": tokens,
        "token_type": [1] * 256 + [3] + [1] * (len(tokens) - 257),
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": 256,
    }


def test_token_ids_of_every_pre_tokenizer(tmp_path: Path) -> None:
    # Forms that NFC changes are split differently, which is said.
    texts = [unicodedata.normalize("NFC", text) for text in (*TEXTS, " a  2024\n\n x\t\t!", "unsplittable")]
    keys = merging_across_blanks(texts)
    found = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken"):
        folder = saved(tmp_path / pre, llama(vocab_size=len(keys["tokens"])), **keys, pre=pre)
        notes = pvs.convert(folder, tmp_path / f"{pre}.gguf", dtype="f32").notes
        assert GgufFile(tmp_path / f"{pre}.gguf").get("tokenizer.ggml.pre") == pre
        engine, tokenizer = Engine(tmp_path / f"{pre}.gguf", 512), AutoTokenizer.from_pretrained(folder)
        found[pre] = [tokenizer(text)["input_ids"] for text in texts]
        for text, ids in zip(texts, found[pre], strict=True):
            has_marks = any(unicodedata.category(character).startswith("M") for character in text)
            said = has_marks and any("combining marks" in note for note in notes)
            assert (engine.ids(text) == ids) != said, (pre, text)
    without_ends = [[[index for index in ids if index != 256] for ids in of_texts] for of_texts in found.values()]
    assert all(one != other for one, other in combinations(without_ends, 2))


@pytest.mark.parametrize("blanks", ["Llama 2's", "always", "first", "never"])
def test_token_ids_of_sentencepiece(
    blanks: str,
    spm: SentencePieceProcessor,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = saved(
        tmp_path / "model", llama(vocab_size=spm.vocab_size()), bos_token_id=1, unknown_token_id=0, **of_spm(spm)
    )
    before = AutoTokenizer.from_pretrained(folder)
    if blanks != "Llama 2's":
        edit(folder, "tokenizer.json", metaspace(prepend_scheme=blanks))
    converted = pvs.convert(folder, tmp_path / "model.gguf", dtype="f32")
    engine, tokenizer = Engine(tmp_path / "model.gguf", 512), AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "In 1999 the boat", "a  b ", "ab" * 20):
        if text.startswith(" ") and converted.notes:
            continue
        assert engine.ids(text) == tokenizer(text)["input_ids"], text
    # What is said of Transformers 5 is so, and llama.cpp does what SentencePiece does.
    for text in (" the boat", "the boat</s>the boat"):
        assert (engine.ids(text) == before(text)["input_ids"]) == (blanks != "never"), text
        differs = engine.ids(text) != tokenizer(text)["input_ids"]
        said = "special tokens with text" if "</s>" in text else "begins with a space"
        assert differs == any(said in note for note in converted.notes), text


def test_a_wrong_order_of_rows_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SMALL["llama"](tmp_path / "model")
    monkeypatch.setattr(writer, "halves_to_pairs", lambda weight, head_dim: weight)
    pvs.convert(folder, tmp_path / "model.gguf", dtype="f32")
    assert difference(folder, tmp_path / "model.gguf") > 5e-3


@pytest.fixture(scope="module")
def article() -> str:
    return list(sample_articles())[-1][1]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the real model in fp32 as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    pvs.convert("smollm2-135m", folder / "nemo", dtype="fp32")
    pvs.convert(folder / "nemo", folder / "model")
    return folder / "model"


PRUNED: dict[str, dict[str, Any]] = {
    "whole": {},
    "depth": {"method": "minitron-depth", "target": "layers=20"},
    "width": {"method": "minitron-width", "target": "hidden=480,ffn=1024"},
    "flap": {"method": "flap", "ratio": 0.2},
    "vocabulary": {"method": "vocabulary", "target": "vocab=32000", "data": "wikipedia-sample"},
}


@pytest.mark.parametrize("case", PRUNED)
def test_smollm2_tokenizes_predicts_and_writes_alike(case: str, smollm2: Path, article: str, tmp_path: Path) -> None:
    folder = smollm2
    if PRUNED[case]:
        folder = tmp_path / "pruned"
        pvs.prune(smollm2, folder, samples=4, sequence_length=256, **PRUNED[case])
    pvs.convert(folder, tmp_path / "model.gguf", dtype="f32")
    engine, tokenizer = Engine(tmp_path / "model.gguf", 512), AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, article[:20_000]):
        assert engine.ids(text) == tokenizer(text)["input_ids"], text
    ids = tokenizer(article)["input_ids"][:500]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    computed = torch.from_numpy(engine.logits(ids))
    assert (computed - expected).abs().max() < 1e-3
    losses = [
        torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(ids[1:])).item() for rows in (computed, expected)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    prompt = tokenizer("The first president of the United States was")["input_ids"]
    greedy = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert engine.continued(prompt, 24) == greedy[0, len(prompt) :].tolist()
