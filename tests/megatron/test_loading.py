"""What a run makes of a checkpoint that lacks something."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest

from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import tiny_job
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel


def _leave_out(checkpoint: Path, pattern: str) -> list[str]:
    """Take what matches a pattern out of a checkpoint's table of contents, and return its names."""
    path = checkpoint / "weights" / ".metadata"
    described = pickle.loads(path.read_bytes())
    names = [name for name in described.state_dict_metadata if re.search(pattern, name)]
    for name in names:
        del described.state_dict_metadata[name]
        described.storage_data = {index: info for index, info in described.storage_data.items() if index.fqn != name}
    path.write_bytes(pickle.dumps(described))
    return names


def _train(job: TrainingJob) -> str:
    """Train, and return what a UserError said."""
    from nemo_pvs.errors import UserError
    from nemo_pvs.megatron import rank

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        rank.train_on_cpu(job)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def job(tmp_path) -> TrainingJob:
    model = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    job = tiny_job(tmp_path, model, steps=1, validations=1, checkpoints=1)
    job.folder.mkdir()
    return job


def test_a_missing_weight_is_refused_by_name(job):
    names = _leave_out(job.initial, r"linear_fc2\.weight|final_layernorm\.weight")
    assert len(names) == 2
    [said] = run_ranks(1, _train, job)
    assert f"{job.initial} lacks decoder.final_layernorm.weight, decoder.layers.0.mlp.linear_fc2.weight" in said
    assert not job.metrics.exists()


def test_missing_extra_states_do_not_matter(job):
    """Checkpoints of earlier versions, and of NeMo without Transformer Engine, lack some."""
    assert len(_leave_out(job.initial, "_extra_state")) > 8
    assert run_ranks(1, _train, job) == [""]
    assert len(metrics.read(job.metrics).training) == 1
