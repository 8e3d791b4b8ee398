"""Families other than Llama train on real NeMo, the same on every layout, and their checkpoints are read back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.windows import validation_windows
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import last_checkpoint
from tests.families import save_tiny
from tests.megatron.ranks import run_ranks, write_tokens

pytestmark = pytest.mark.parallel

STEPS, SEQUENCE, SAMPLES = 6, 32, 4


def _train(job: TrainingJob) -> None:
    import os

    from nemo_pvs.megatron import rank

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    rank.train_on_cpu(job)


def _run(job: TrainingJob, folder: Path, **layout) -> TrainingJob:
    job = replace(job, folder=folder, layout=Parallelism(**layout))
    folder.mkdir()
    run_ranks(job.layout.processes, _train, job)
    return job


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": SEQUENCE}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
    ids=["llama with biases", "mistral", "qwen2", "qwen3"],
)
def test_two_ranks_train_as_one_and_the_result_is_read_back(family, settings, tmp_path):
    before = HuggingFaceSource(save_tiny(tmp_path / "model", family, **settings))
    write_nemo(before, tmp_path / "initial")
    pattern = torch.randint(3, 128, (97,), generator=torch.Generator().manual_seed(0)).repeat(50).tolist()
    job = TrainingJob(
        name="test",
        folder=tmp_path,
        initial=tmp_path / "initial",
        data={
            "train": write_tokens(tmp_path / "train", pattern),
            "validation": write_tokens(tmp_path / "validation", pattern[: SAMPLES * SEQUENCE + 1]),
        },
        layout=Parallelism(),
        training=Training(
            tokens=STEPS * 4 * SEQUENCE,
            sequence_length=SEQUENCE,
            global_batch_size=4,
            micro_batch_size=2,
            learning_rate=1e-2,
            precision="fp32",
            validations=1,
            validation_samples=SAMPLES,
            checkpoints=1,
        ),
    )
    one = _run(job, tmp_path / "one", distributed_optimizer=False)
    two = _run(job, tmp_path / "two", tensor_parallel=2, sequence_parallel=True)
    curves = [metrics.read(run.metrics) for run in (one, two)]
    losses = [[point["loss"] for point in curve.training] for curve in curves]
    assert losses[0][-1] < losses[0][0] - 0.1, "it does not learn"
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    trained = open_source(last_checkpoint(two))
    assert shape_of(trained) == shape_of(before)
    changes = {"llama": "o_proj.bias", "mistral": "o_proj.weight", "qwen2": "q_proj.bias", "qwen3": "q_norm.weight"}
    name = f"model.layers.1.self_attn.{changes[family]}"
    assert not torch.equal(trained.read(name), before.read(name))
    windows = validation_windows(Path(job.data["validation"]), samples=SAMPLES, sequence_length=SEQUENCE)
    assert perplexity(trained, windows)["loss"] == pytest.approx(curves[1].validation[-1]["loss"], abs=1e-4)
