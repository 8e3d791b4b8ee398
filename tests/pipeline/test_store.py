"""Steps of a run are done once; what took long to make is not removed unasked."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.records import Record
from nemo_pvs.pipeline.stage import Stage
from nemo_pvs.pipeline.store import Stages
from nemo_pvs.system.files import read_json


@dataclass(frozen=True)
class Counted(Record):
    """How often a stage has been worked on."""

    count: int


def _train(folder: Path, rate: float, *, force: tuple[str, ...] | None = (), dies: bool = False) -> int:
    """Run a stage that counts how often it has been worked on, and return the count."""
    out = folder / "train" / "width"

    def work() -> Counted:
        out.mkdir(parents=True, exist_ok=True)
        count = out / "count"
        count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
        if dies:
            raise KeyboardInterrupt
        return Counted(int(count.read_text()))

    inputs = {"training": {"learning_rate": rate}, "initial": "f" * 64}
    stage = Stage(
        name="train/width",
        record=Counted,
        inputs=lambda: inputs,
        work=work,
        outputs=[out],
        keep_partial=True,
        precious=[out],
    )
    return Stages(folder, force).run(stage).count


def test_an_interrupted_stage_goes_on_and_a_finished_one_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, 1e-3, dies=True)
    assert _train(tmp_path, 1e-3) == 2
    assert _train(tmp_path, 1e-3) == 2


def _answer(folder: Path, models: list[str], *, force: tuple[str, ...] = ()) -> list[str]:
    """Run a stage that keeps an answer for every model, and return the models that it asked."""
    store, asked = folder / "tasks" / "measured", []

    def work() -> Counted:
        for model in models:
            if not (store / model).exists():
                asked.append(model)
                store.mkdir(parents=True, exist_ok=True)
                (store / model).touch()
        (folder / "tasks" / "results.json").write_text(" ".join(models))
        return Counted(len(models))

    stage = Stage(
        name="evaluate/tasks",
        record=Counted,
        inputs=lambda: {"models": models},
        work=work,
        outputs=[folder / "tasks" / "results.json"],
        reusable=[folder / "tasks"],
        keep_partial=True,
    )
    Stages(folder, force).run(stage)
    assert (folder / "tasks" / "results.json").read_text() == " ".join(models)
    return asked


def test_inputs_match_as_they_are_read_back(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    before = {"inputs": {"text": "a", "validation": [8, 16]}}
    assert stages.matches(before, {"text": "a", "validation": (8, 16)})
    assert not stages.matches(before, {"text": "a", "validation": (8, 32)})
    assert not stages.matches(before, {"text": "a"})
    assert not stages.matches(before, {"text": "a", "validation": (8, 16), "blend": [0.7, 0.3]})
    assert not stages.matches({}, {"text": "a"})


def test_answers_are_kept_when_a_model_is_added(tmp_path: Path) -> None:
    assert _answer(tmp_path, ["parent", "width"]) == ["parent", "width"]
    assert _answer(tmp_path, ["parent", "width", "depth"]) == ["depth"]
    assert _answer(tmp_path, ["parent", "depth"]) == []
    assert _answer(tmp_path, ["parent", "depth"], force=("evaluate",)) == ["parent", "depth"]


@pytest.mark.parametrize("dies", [True, False])
def test_what_took_long_is_not_removed_unasked(tmp_path: Path, dies: bool) -> None:
    if dies:
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path, 1e-3, dies=True)
    else:
        _train(tmp_path, 1e-3)
    with pytest.raises(UserError, match=r"made with training.learning_rate 0.001, not 0.002; .* --force train/width"):
        _train(tmp_path, 2e-3)
    assert _train(tmp_path, 1e-3) == (2 if dies else 1), "the refusal has touched what was there"
    with pytest.raises(UserError, match=rf"not 0.002; remove {tmp_path} to train it again"):
        _train(tmp_path, 2e-3, force=None)
    assert _train(tmp_path, 2e-3, force=("train/width",)) == 1


def test_a_removal_that_was_interrupted_leaves_nothing_that_passes_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train(tmp_path, 1e-3)
    (tmp_path / "train" / "width" / "weights").write_text("all of them")

    def killed(folder: Path, **_: object) -> None:
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path, 1e-3, force=("train",))
    assert _train(tmp_path, 1e-3) == 1, "what was left of the removed folder passed for the result"
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["width"]
    assert [path.name for path in (tmp_path / "train" / "width").iterdir()] == ["count"]


def test_equal_stages_of_a_kind_are_done_once(tmp_path: Path) -> None:
    """And a second one that was killed while it took over the output of the first starts over."""
    done: list[str] = []

    def run(stages: Stages, name: str, ratio: float) -> int:
        out = tmp_path / name

        def work() -> Counted:
            out.mkdir(parents=True)
            (out / "weights").write_text(str(ratio))
            done.append(name)
            return Counted(len(done))

        stage = Stage(
            name=name,
            record=Counted,
            inputs=lambda: {"ratio": ratio},
            work=work,
            outputs=[out],
            keep_partial=True,
            shared=True,
        )
        return stages.run(stage).count

    stages = Stages(tmp_path)
    assert run(stages, "prune/a", 0.5) == 1
    (tmp_path / "prune" / "b").mkdir()
    (tmp_path / "prune" / "b" / "torn").touch()
    assert run(stages, "prune/b", 0.5) == 1
    assert {path.name: path.read_text() for path in (tmp_path / "prune" / "b").iterdir()} == {"weights": "0.5"}
    assert run(stages, "prune/c", 0.6) == 2
    assert run(stages, "masks/a", 0.5) == 3
    again = Stages(tmp_path)
    for name, ratio, count in (("prune/a", 0.5, 1), ("prune/b", 0.5, 1), ("prune/d", 0.6, 4)):
        assert run(again, name, ratio) == count
    assert done == ["prune/a", "prune/c", "masks/a", "prune/d"]


def test_a_forced_stage_that_was_begun_goes_on(tmp_path: Path) -> None:
    """As a training that was started ahead of its stage, whose result must not be removed again."""
    out = tmp_path / "train"
    stage = Stage(
        name="train/width",
        record=Counted,
        inputs=dict,
        work=lambda: Counted(int(out.read_text())),
        outputs=[out],
        precious=[out],
        keep_partial=True,
    )
    before = Stages(tmp_path)
    assert before.begin(stage)
    out.write_text("1")
    assert before.run(stage).count == 1
    stages = Stages(tmp_path, ("train",))
    assert stages.begin(stage)
    assert not out.exists()
    out.write_text("2")
    assert stages.begin(stage)
    assert stages.run(stage, worked=lambda: 3600.0).count == 2
    assert stages.run(stage).count == 2
    assert read_json(tmp_path / "stages" / "train-width.json")["seconds"] == pytest.approx(3600, abs=60)


def test_a_stage_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(name="data", record=Counted, inputs=dict, work=lambda: Counted(1))
    for _ in range(2):
        stages = Stages(tmp_path)
        for _ in range(3):
            stages.run(stage)
    assert [line.split("(")[0].strip() for line in capsys.readouterr().out.splitlines()] == [
        "→ data",
        "✓ data",
        "✓ data",
    ]
