"""Generated text is that of Transformers' own greedy decoding, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nemo_pvs.modeling  # noqa: F401 - AutoModelForCausalLM loads our uneven models
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.scoring import TransformersScorer
from tests.conftest import save_tiny_tokenizer
from tests.families import CASES, save_tiny
from tests.uneven_model import BIASES, make_uneven_llama

NEW = 24
LENGTHS = (1, 5, 17, 17, 18, 40, 41, 3)


def prompts(seed: int = 0, vocab: int = 128) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def ours(folder: Path, **settings: Any) -> CheckpointLM:
    scorer = TransformersScorer(HuggingFaceSource(folder), dtype=torch.float32, device="cpu")
    return CheckpointLM(scorer, AutoTokenizer.from_pretrained(folder), 256, **settings)


def by_transformers(folder: Path, asked: list[list[int]], new: int = NEW) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "eos_token_id": 0, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in asked]


@pytest.mark.parametrize(("family", "about", "settings"), [*CASES, ("uneven", "", {})])
def test_greedy_is_that_of_transformers_for_every_family(family, about, settings, tmp_path):
    if family == "uneven":
        folder = save_tiny_tokenizer(make_uneven_llama(tmp_path, **BIASES))
    else:
        folder = save_tiny(tmp_path, family, **settings)
    expected = by_transformers(folder, prompts())
    assert len({tuple(answer) for answer in expected}) > len(expected) // 2
    for size in (None, 1, 3):
        assert ours(folder, batch_size=size).greedy(prompts(), NEW) == expected
