"""Record everything in ``golden/`` again: ``python -m tests.unchanged.record``; takes minutes, as it trains.

With ``--keep-run`` the archive of a finished run stays the one that an earlier version made, which is the point of it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.unchanged import finished_run
from tests.unchanged.conftest import GOLDEN, RECORDING


class Recorder:
    """Makes the tests write what they compare with."""

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[RECORDING] = True


def main(arguments: list[str]) -> int:
    """Record, and return the exit code of the tests, which hold then."""
    if arguments not in ([], ["--keep-run"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        with tempfile.TemporaryDirectory() as folder:
            finished_run.make(Path(folder))
            finished_run.pack(Path(folder))
    for folder in GOLDEN.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    return int(pytest.main([str(Path(__file__).parent), "-q"], plugins=[Recorder()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
