"""Gradients of Megatron's ranks, at any TP x PP x DP, are those of the pass that holds one layer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_pvs.calibration.gradients import taylor_scores
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.layerwise.model import LayerwiseModel
from tests.calibration.test_engine import token_set
from tests.conftest import save_tiny_tokenizer
from tests.families import save_tiny
from tests.megatron.ranks import run_ranks
from tests.state_source import random_ids

pytestmark = pytest.mark.parallel

SAMPLES = 5
"""Copies of the model get unequal shares."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 4}),
    "tied, a vocabulary that needs padding": (
        "llama",
        {"num_hidden_layers": 4, "tie_word_embeddings": True, "vocab_size": 129},
    ),
    "qwen3": ("qwen3", {"num_hidden_layers": 4}),
}


def _measure(folders: list[Path], tensor_parallel: int, pipeline_parallel: int) -> list[dict[str, Any]]:
    """Be a rank; return the scores of each checkpoint."""
    from nemo_pvs.megatron.gradients import megatron_taylor_scores
    from nemo_pvs.megatron.inference import megatron_ranks
    from nemo_pvs.system.ranks import joined

    with joined(on_gpus=True), megatron_ranks(tensor_parallel, pipeline_parallel):
        found = [megatron_taylor_scores(open_source(folder), token_set(samples=SAMPLES)) for folder in folders]
    return [{name: tensor.numpy() for name, tensor in scores.items()} for scores in found]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for index, (family, settings) in enumerate(MODELS.values()):
        folder = tmp_path_factory.mktemp(f"model-{index}")
        huggingface = HuggingFaceSource(save_tiny(folder / "hf", family, **settings))
        write_nemo(huggingface, folder / "nemo")
        made.append(folder / "nemo")
    return made


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    tokens = token_set(samples=SAMPLES)
    return [taylor_scores(LayerwiseModel(open_source(folder)), tokens) for folder in folders]


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "pipeline_parallel"),
    [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2), (4, 2, 1)],
    ids=["1", "TP=2", "PP=2", "DP=2", "TP=2 PP=2", "TP=2 DP=2"],
)
def test_every_layout_has_the_same_scores(
    folders: list[Path],
    expected: list[dict[str, torch.Tensor]],
    world: int,
    tensor_parallel: int,
    pipeline_parallel: int,
) -> None:
    found = run_ranks(world, _measure, folders, tensor_parallel, pipeline_parallel)
    for about, by_rank, scores in zip(MODELS, zip(*found, strict=True), expected, strict=True):
        for its in by_rank:
            assert its.keys() == scores.keys()
            for name, tensor in scores.items():
                # Sums of terms of both signs cancel.
                atol = 1e-4 * float(tensor.max()) if name.endswith(("vectorize", "mix")) else 0
                np.testing.assert_allclose(its[name], tensor.numpy(), rtol=1e-4, atol=atol, err_msg=f"{about}: {name}")
                np.testing.assert_array_equal(its[name], by_rank[0][name])


def _calibrate(source: Path, out: Path, text: Path) -> None:
    """Be a rank of ``torchrun pvs calibrate``."""
    from nemo_pvs.cli.pruning import calibrate

    calibrate(
        str(source),
        str(out),
        data=str(text),
        samples=SAMPLES,
        sequence_length=24,
        gradients=True,
        tensor_parallel=int(os.environ["WORLD_SIZE"]),
        device="cpu",
    )


def test_the_verb_measures_the_same_on_megatron(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token}" for token in random_ids(1, 400)[0].clamp(min=2)))
    by_layout = []
    for world in (1, 2):
        out = tmp_path / f"scores-{world}"
        run_ranks(world, _calibrate, folder, out, text)
        by_layout.append(Scores.load(out, HuggingFaceSource(folder)))
    alone, shared = (scores.tensors for scores in by_layout)
    assert alone.keys() - shared.keys() == {"attention.fluctuation", "ffn.fluctuation"}
    for name in ("groups.param_first", "ffn.param_second", "ffn.energy"):
        torch.testing.assert_close(shared[name], alone[name], rtol=1e-4, atol=0)
