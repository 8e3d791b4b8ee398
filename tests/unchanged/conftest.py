"""Compares text with a file of ``golden/``, or writes the file where ``tests.unchanged.record`` runs the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RECORDER = "tests.unchanged.record"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Fail unless the text is that of a golden file, named by its path below ``golden/``."""
    records = request.config.pluginmanager.has_plugin(RECORDER)

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if records:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"nothing was recorded as {name}"
        assert text == path.read_text(), f"not what was recorded in {path}"

    return check
