"""A run folder that earlier code made: nothing of it is done again, and its report is the same.

It has a target of every kind of method, so each kind of record is compared with what today's code would write.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.unchanged.finished_run import unpack


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """The folder in which the run was made, of its own for each test, and the working folder."""
    monkeypatch.chdir(tmp_path)
    return unpack(tmp_path)


def _records(made: Path) -> dict[str, dict]:
    """Return what is written of every stage; how long it took, which no second attempt takes again, is part of it."""
    return {path.stem: json.loads(path.read_text()) for path in (made / "run" / "stages").glob("*.json")}


def _succeed(answer) -> str:
    assert answer.code == 0, answer.errors
    return answer.output


@pytest.mark.slow
def test_no_stage_is_done_again(made, pvs):
    """The checkpoints that training would go on from are not even there; the results are collected anew."""
    before, results = _records(made), json.loads((made / "run" / "results.json").read_text())
    assert len(before) > 60
    output = _succeed(pvs("run", "recipe.yaml", "--out", "run"))
    assert output.count("(done earlier, ") == len(before)
    assert _records(made) == before
    again = json.loads((made / "run" / "results.json").read_text())
    of_now = {"created": again["created"], "environment": again["environment"]}
    assert again == {**results, **of_now}


@pytest.mark.slow
def test_nothing_is_prepared_again(made, pvs):
    """As on a cluster, where jobs stand between what is prepared and what is trained."""
    before, jobs = _records(made), _jobs(made)
    output = _succeed(pvs("run", "recipe.yaml", "--out", "run", "--prepare-only"))
    assert output.count("ready to train: ") == sum(name.startswith("train-") for name in before) - 1
    assert _records(made) == before
    assert _jobs(made) == jobs


def _jobs(made: Path) -> dict[Path, dict]:
    """Return the job files of all trainings."""
    return {path: json.loads(path.read_text()) for path in (made / "run").glob("*/**/job.json")}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["width", "gradients", "dense", "learned", "aware"])
def test_a_target_pruned_again_is_the_same(target, made, pvs):
    """From the scores, or from what training has learned, as recorded; so no sum is computed that could differ."""
    before = _records(made)
    (made / "run" / "stages" / f"prune-{target}.json").unlink()
    shutil.rmtree(made / "run" / "pruned" / target)
    _succeed(pvs("run", "recipe.yaml", "--out", "run", "--prepare-only"))
    after = _records(made)
    assert after[f"prune-{target}"].pop("seconds") != before[f"prune-{target}"].pop("seconds")
    assert after == before


@pytest.mark.slow
def test_report(made, pvs, golden):
    """All numbers, and all text of the page and of the terminal; of figures, which fonts may change, none.

    Numbers that a report has gained since are recorded in the golden files.
    """
    output = _succeed(pvs("report", "run", "--out", "again"))
    before, after = (json.loads((made / name / "report.json").read_text()) for name in ("run", "again"))
    _assert_kept(before, after)
    assert (made / "again" / "tasks.csv").read_text() == (made / "run" / "tasks.csv").read_text()
    for name in ("report.md", "report.csv", "equal_terms.csv"):
        golden(f"report/{name}", (made / "again" / name).read_text())
    page = (made / "again" / "report.html").read_text()
    for part in ("svg", "style"):
        page = re.sub(f"(?s)<{part}.*?</{part}>", "", page)
    golden("report/page.txt", re.sub(r"\s*\n\s*", "\n", re.sub("<[^>]*>", "\n", page)))
    golden("report/terminal.txt", re.sub("Report: .*", "Report: report.html", output))


def _assert_kept(before, after) -> None:
    """Check that every number and text of a report is still there and the same."""
    if isinstance(before, dict):
        for key, value in before.items():
            _assert_kept(value, after[key])
    elif isinstance(before, list):
        for value, other in zip(before, after, strict=True):
            _assert_kept(value, other)
    else:
        assert after == before
