import os
from pathlib import Path

import pytest

from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.files import write_json
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from tests.benchmarks.stages import seconds


def test_stages_in_their_order_and_the_parts_of_a_training(tmp_path: Path) -> None:
    training = Training(
        tokens=200, sequence_length=10, global_batch_size=10, learning_rate=1e-3, validation_samples=10
    )
    arm = tmp_path / "train" / "arm"
    job = TrainingJob("arm", arm, tmp_path / "initial", {}, Parallelism(), training)
    arm.mkdir(parents=True)
    job.save()
    for step, (speed, since) in enumerate([(50.0, 2.0), (25.0, 9.0)], 1):  # 2 s, then 3 s of validation, then 4 s
        record = {"kind": "training", "step": step, "tokens_per_second": speed, "seconds": since}
        metrics.append(job.metrics, record)
    for time, (stage, spent) in enumerate([("prune/arm", 4.0), ("train/arm", 30.0), ("evaluate/arm", 5.0)]):
        path = tmp_path / "stages" / f"{stage.replace('/', '-')}.json"
        write_json(path, {"stage": stage, "seconds": spent})
        os.utime(path, (time, time))
    write_json(tmp_path / "stages" / "report.begun.json", {})
    assert list(seconds(tmp_path)) == [
        ("prune/arm", 4.0),
        ("train/arm: steps", pytest.approx(6.0)),
        ("train/arm: between steps", pytest.approx(3.0)),
        ("train/arm: start and end", pytest.approx(21.0)),
        ("evaluate/arm", 5.0),
    ]
