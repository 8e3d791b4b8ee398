"""What is printed where no terminal is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("columns", "width"), [(None, 160), ("90", 90)])
def test_tables_in_a_log_are_not_squeezed_into_80_columns(columns, width):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", "from nemo_pvs.system.progress import console; print(console.width)"]
    printed = subprocess.run(
        command,
        env={**environment, **({"COLUMNS": columns} if columns else {})},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert int(printed) == width
