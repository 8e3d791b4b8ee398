"""What was recorded, to compare with; ``tests.unchanged.record`` runs the same tests and writes it instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RECORDING = pytest.StashKey[bool]()
"""Whether golden files are written."""
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def recorded(request: pytest.FixtureRequest) -> Callable[[str, str], str]:
    """Return the text of a file, named by its path below ``golden/``; while recording, write the given text first."""
    records = request.config.stash.get(RECORDING, False)

    def read(name: str, text: str) -> str:
        path = GOLDEN / name
        if records:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"nothing was recorded as {path}"
        return path.read_text()

    return read


@pytest.fixture(scope="session")
def golden(recorded: Callable[[str, str], str]) -> Callable[[str, str], None]:
    """Fail unless a text is that of a file below ``golden/``."""

    def check(name: str, text: str) -> None:
        assert text == recorded(name, text), f"not what was recorded in {GOLDEN / name}"

    return check
