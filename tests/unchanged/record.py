"""Record everything in ``golden/`` again: ``python -m tests.unchanged.record``; takes minutes, as it trains.

With ``--keep-run`` the archive of a finished run stays the one that an earlier version made, which is the point of it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from tests.unchanged import finished_run
from tests.unchanged.conftest import RECORDER


class Recorder:
    """Its presence makes the fixture ``golden`` write."""


def main(arguments: list[str]) -> int:
    """Record, and return the exit code of the tests, which then hold."""
    if "--keep-run" not in arguments:
        with tempfile.TemporaryDirectory() as folder:
            finished_run.make(Path(folder))
            finished_run.pack(Path(folder))

    class _Named:
        def pytest_configure(self, config: pytest.Config) -> None:
            config.pluginmanager.register(Recorder(), RECORDER)

    return int(pytest.main([str(Path(__file__).parent), "-q"], plugins=[_Named()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
