"""SmolLM2-135M on real Megatron ranks, from a NeMo checkpoint: it computes and answers what it does elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_pvs.checkpoints.fetch import SMOLLM2, prepare_parent
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.scoring import TransformersScorer
from tests.megatron.ranks import run_ranks
from tests.megatron.test_evaluation import CONTEXT, _ask_huggingface, _ask_megatron, _assert_equal, _lines
from tests.megatron.test_logits import _largest_difference

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

COUNTRIES = 2
"""Whose capitals are asked for: all of them would be of one kind, and the model takes a while for each."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The model as published, and as a NeMo checkpoint in fp32; 800 MB, which do not stay."""
    folder = tmp_path_factory.mktemp("smollm2")
    bf16 = prepare_parent(SMOLLM2, folder / "bf16")
    write_nemo(HuggingFaceSource(bf16), folder / "nemo", dtype=torch.float32)
    yield bf16, folder / "nemo"
    shutil.rmtree(folder)


def test_real_text_has_the_same_logits(folders):
    bf16, nemo = folders
    text = (
        "The quick brown fox jumps over the lazy dog, and the history of the steam engine begins in antiquity, "
        "when Hero of Alexandria described a sphere that turned by the force of escaping steam."
    )
    ids = torch.tensor([AutoTokenizer.from_pretrained(bf16)(text)["input_ids"]])
    assert _largest_difference(bf16, nemo, ids, (1, 2)) < 1e-4


def test_every_kind_of_request_is_answered_alike(folders):
    bf16, nemo = folders
    expected, generated = _ask_huggingface(bf16, COUNTRIES), _generate_by_huggingface(bf16)
    for world, tensor, pipeline in ((1, 1, 1), (2, 1, 2)):
        (answers, _), *_ = run_ranks(world, _ask_megatron, [nemo], tensor, pipeline, None, COUNTRIES)
        _assert_equal(answers, [expected])
    assert set(run_ranks(2, _generate_by_megatron, nemo)) == {generated}
    scorer = TransformersScorer(HuggingFaceSource(bf16), dtype=torch.float32, device="cpu")
    assert _generated(CheckpointLM(scorer, AutoTokenizer.from_pretrained(bf16), CONTEXT)) == generated


def _generated(model: Any) -> tuple[str, ...]:
    settings = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    texts = [*(line["text"] for line in _lines("letters")), "The capital of France is"]
    return tuple(model.generate_until([SimpleNamespace(args=(text, settings)) for text in texts]))


def _generate_by_huggingface(folder: Path) -> tuple[str, ...]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return _generated(HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT, batch_size=1, device="cpu"))


def _generate_by_megatron(folder: Path) -> tuple[str, ...]:
    from nemo_pvs.megatron.inference import MegatronScorer, megatron_ranks
    from nemo_pvs.system.ranks import joined

    with joined(on_gpus=True), megatron_ranks(1, 2):
        scorer = MegatronScorer(open_source(folder), dtype=torch.float32, device="cpu")
        tokenizer = AutoTokenizer.from_pretrained(folder / "context" / "tokenizer")
        return _generated(CheckpointLM(scorer, tokenizer, CONTEXT))
