"""A run folder that earlier code made: nothing of it is done again, and its report is the same.

It has a target of every kind of method, so that each kind of record is compared with what today's code would write.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.source import fingerprint
from tests.unchanged.finished_run import unpack


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """The folder in which the run was made, of its own for each test, and the working folder."""
    monkeypatch.chdir(tmp_path)
    return unpack(tmp_path)


def _records(made: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in sorted((made / "run" / "stages").glob("*.json"))}


def _succeed(answer) -> str:
    assert answer.code == 0, answer.errors
    return answer.output


def test_a_finished_run_is_finished(made, pvs):
    """Whole, without the checkpoints that training would need: nothing asks for them."""
    before = _records(made)
    assert len(before) == 49
    output = _succeed(pvs("run", "recipe.yaml", "--out", "run"))
    assert "→" not in output
    assert output.count("(done earlier, ") == len(before)
    assert _records(made) == before
