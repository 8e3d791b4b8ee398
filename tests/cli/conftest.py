"""What the tests of the verbs share, also with those of the scaling laws."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.scaling.conftest import drawn  # noqa: F401


@pytest.fixture
def model(tmp_path) -> Path:
    return save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    generator = random.Random(0)
    for index in range(8):
        (folder / f"{index}.txt").write_text(" ".join(f"w{generator.randint(2, 127)}" for _ in range(400)))
    return folder
