"""llama.cpp computes what Transformers computes: token ids, logits, perplexity and greedy text of our GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import nemo_pvs as pvs
import nemo_pvs.checkpoints.gguf.write as writer
import nemo_pvs.modeling  # layers of different sizes in Transformers
from nemo_pvs.data.wikipedia import sample_articles
from tests.checkpoints.gguf_writer import MERGING_TOKENIZER
from tests.checkpoints.test_gguf_model import qwen
from tests.checkpoints.test_gguf_tokenizer import AWKWARD, PUBLISHED, tokenizer_of
from tests.checkpoints.test_gguf_write import MODELS, mistral, saved
from tests.llamacpp.engine import Engine
from tests.uneven_model import LLAMA3_ROPE, make_uneven_llama

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
    make_uneven_llama(folder, vocab_size=260, **settings)
    tokenizer_of(folder.parent, **MERGING_TOKENIZER).save_pretrained(folder)
    return folder


SMALL: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, make=make: saved(folder, make()) for name, (make, _) in MODELS.items()},
    "mistral": lambda folder: saved(folder, mistral(sliding_window=256)),
    "qwen2 whose heads are wider": lambda folder: saved(folder, qwen(Qwen2Config, head_dim=32)),
    "uneven": lambda folder: uneven(folder),
    "uneven with biases": lambda folder: uneven(folder, attention_bias=True, mlp_bias=True),
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
