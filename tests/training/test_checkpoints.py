import pytest

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.errors import UserError
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import checkpoints, metrics
from nemo_pvs.training.checkpoints import (
    checkpoint_name,
    damage,
    newest_sound,
    saved_checkpoints,
    say_broken,
    set_aside,
    state_to_carry,
)
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.job_progress import latest
from tests.conftest import make_tiny_llama, save_tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    """Three whole checkpoints, and one that is being written."""
    source = HuggingFaceSource(save_tiny_tokenizer(make_tiny_llama(tmp_path / "model")))
    for steps in (5, 10, 100, 110):
        write_nemo(source, tmp_path / "run" / checkpoint_name(steps))
    (tmp_path / "run" / f"{checkpoint_name(110)}-unfinished").touch()
    return tmp_path / "run"


def test_newest_first_by_step_and_only_finished_ones(folder):
    assert [path.name for path in saved_checkpoints(folder)] == ["step=99-last", "step=9-last", "step=4-last"]
    assert newest_sound(folder) == (folder / "step=99-last", {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "keep", "word"),
    [
        ("weights/__0_0.distcp", 0.999, "cut short"),
        ("weights/__0_0.distcp", None, "cut short or missing"),
        ("weights/.metadata", 0.5, "broken"),
        ("weights/.metadata", None, ".metadata"),
        ("weights/common.pt", 0, "common.pt is missing or empty"),
        ("context/io.json", None, "io.json is missing"),
    ],
)
def test_damage_is_seen_and_the_one_before_taken(folder, part, keep, word):
    newest = folder / "step=99-last"
    file = newest / part
    if keep is None:
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content))])
    assert word in damage(newest)
    chosen, broken = newest_sound(folder)
    assert chosen == folder / "step=9-last"
    assert list(broken) == [newest]
    (sentence,) = say_broken(chosen, broken)
    assert sentence.endswith("resuming from step=9-last.")
    set_aside(broken)
    assert newest_sound(folder) == (folder / "step=9-last", {})
    assert (folder / "broken").is_dir()


def test_nothing_to_go_on_from(tmp_path):
    assert newest_sound(tmp_path / "nothing") == (None, {})


@pytest.mark.parametrize(("steps", "left"), [(10, "20 s"), (150, "5 min"), (9000, "5.0 h")])
def test_time_left_is_the_pace_of_the_last_steps(steps, left):
    """100 tokens a step, 2 s each; one of ten waited an hour for a validation."""
    speeds = [50 if step != 5 else 0.03 for step in range(1, 11)]
    assert metrics.time_left(100 * steps, speeds) == left


def test_the_line_of_progress_has_what_was_measured():
    curve = metrics.Metrics(training=[{"step": 1, "loss": 3.25, "tokens_per_second": 1234.5}], validation=[])
    assert latest(curve) == "loss 3.250, 1,234 tokens/s"
    curve.validation.append({"step": 1, "loss": 3.125})
    curve.sparsity.append({"step": 1, "zero_fraction": 0.5})
    assert latest(curve) == "loss 3.250, 1,234 tokens/s, validation 3.125, 50.00% zeros"


def test_optimizer_state_is_carried_over_from_the_last_step_only(tmp_path, monkeypatch):
    """Of two kept checkpoints the last is broken; the moments of the one before are not those of the weights."""
    run = tmp_path / "train" / "small-stages" / "1"
    training = Training(
        tokens=20 * 8, sequence_length=8, global_batch_size=1, learning_rate=1e-3, validation_samples=1
    )
    job = TrainingJob("small 1", run, run / "initial", {"train": "", "validation": ""}, Parallelism(), training)
    job.save()
    sound = {"newest": job.checkpoints / checkpoint_name(20)}
    monkeypatch.setattr(checkpoints, "newest_sound", lambda _: (sound["newest"], {}))
    assert state_to_carry(job.checkpoints) == sound["newest"]
    for sound["newest"] in (job.checkpoints / checkpoint_name(10), None):
        with pytest.raises(UserError, match=r"of the last step in .* \(--force train/small/stage-1\)"):
            state_to_carry(job.checkpoints)
