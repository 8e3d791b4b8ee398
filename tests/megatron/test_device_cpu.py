"""``--device cpu`` on a machine with a GPU and Transformer Engine: neither is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.open import open_source
from tests.conftest import make_tiny_llama
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel


def _losses(folder: Path, there_is_a_gpu: bool) -> tuple[list[float], list[str], bool]:
    """Return the log-probabilities of a text, the modules of the model, and whether CUDA is hidden afterwards."""
    from nemo_pvs.megatron.inference import MegatronScorer, megatron_ranks
    from nemo_pvs.system import transformer_engine

    if there_is_a_gpu:
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 8
        transformer_engine.import_problem = lambda: None
    ids = torch.arange(2, 34).reshape(2, 16)
    with megatron_ranks(device="cpu"):
        scorer = MegatronScorer(open_source(folder), dtype=torch.float32, device="cpu")
        scores = scorer.score(ids)
    assert scores is not None
    modules = sorted({type(module).__name__ for module in scorer.model.modules()})
    return scores.logprobs.flatten().tolist(), modules, torch.cuda.is_available()


def test_a_model_on_the_cpu_is_the_same_where_there_is_a_gpu(tmp_path):
    folder = make_tiny_llama(tmp_path / "model")
    [(expected, modules, visible)] = run_ranks(1, _losses, folder, False)
    assert not visible
    assert "SdpaCausalAttention" in modules
    [(found, same_modules, visible)] = run_ranks(1, _losses, folder, True)
    assert visible, "the GPU stays hidden"
    assert (found, same_modules) == (expected, modules)
