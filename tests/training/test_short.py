"""The loss by which a search compares candidates after a short training, whatever training has measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_pvs.checkpoints.huggingface.folder import write_huggingface
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.tokenize import write_token_file
from nemo_pvs.data.windows import validation_windows
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan, whole_layers
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import metrics, short
from tests.state_source import StateSource, random_ids, tiny_model

TRAINING = Training(
    tokens=14 * 8, sequence_length=8, global_batch_size=1, learning_rate=1e-3, validation_samples=4, validations=4
)


@pytest.mark.parametrize(("measured", "expected"), [((3, 6, 9, 12, 14), 14.0), ((3, 6, 9, 12), None), ((), None)])
def test_the_loss_is_that_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: tuple[int, ...], expected: float | None
) -> None:
    """Training that was killed after its last save has measured an earlier step last, or none."""
    source = StateSource(tiny_model(num_hidden_layers=2))
    shape = shape_of(source)
    plan = Plan("test", shape, shape.replace(layers=1), **whole_layers(shape, [1]))
    write_token_file(tmp_path / "validation", [random_ids(1, 64)[0].tolist()], shape.vocab)
    job = SimpleNamespace(metrics=tmp_path / "metrics.jsonl")

    class Trained:
        def __init__(self, log: Path) -> None:
            pass

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def train(self, _: Any) -> Path:
            for step in measured:
                metrics.append(job.metrics, {"kind": "validation", "step": step, "loss": float(step)})
            write_huggingface(PrunedSource(source, plan), tmp_path / "trained")
            return tmp_path / "trained"

    monkeypatch.setattr(short, "Trainer", Trained)
    monkeypatch.setattr(short, "prepare_job", lambda *_, **__: job)
    with short.short_training(source, tmp_path / "runs", tmp_path, Parallelism(), TRAINING) as train:
        loss = train(plan)
    windows = validation_windows(tmp_path / "validation", samples=4, sequence_length=8)
    assert loss == (expected or perplexity(PrunedSource(source, plan), windows)["loss"])
