"""What is printed where no terminal is, and on one."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
from rich.console import Console
from rich.table import Table

from nemo_pvs.system import progress


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


def test_brackets_and_colons_are_printed_as_they_are(capsys):
    """Of paths, names and titles, anywhere: as markup they would be dropped, or be an error."""
    table = Table("[bold]run[/x]", title="[z]")
    table.add_row("runs/[red]a[/] :smile:")
    progress.console.print("runs/[red]a[/y] :smile:", table)
    progress.console.rule("[w/]")
    progress.warn("it is in [b/]")
    printed = capsys.readouterr().out
    for text in (
        "[bold]run[/x]",
        "[z]",
        "runs/[red]a[/] :smile:",
        "runs/[red]a[/y] :smile:",
        "[w/]",
        "! it is in [b/]",
    ):
        assert text in printed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (90, "90 s"), (119, "119 s"), (121, "2 min"), (7100, "118 min"), (9000, "2.5 h")],
)
def test_every_line_spells_a_time_in_one_way(seconds, text):
    assert progress.short_time(seconds) == text


def test_a_line_in_a_log_says_how_long_the_rest_takes(monkeypatch):
    """Ten layers in 25 s, of 200."""
    printed = io.StringIO()
    times = iter([0.0, 25.0])
    monkeypatch.setattr(progress, "console", Console(file=printed, width=120))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.progress("calibrate", "layers") as show:
        show(10, 200)
    assert printed.getvalue() == "  calibrate: 10/200 layers, 8 min left\n"


def test_a_terminal_shows_a_row_for_each_task_in_one_display(monkeypatch):
    """As for jobs that are trained at the same time, of which any may end first."""
    shown = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        progress,
        "console",
        Console(file=shown, force_terminal=True, width=120, color_system=None, legacy_windows=False),
    )
    with ExitStack() as first, progress.progress("train second", "tokens") as second:
        first.enter_context(progress.progress("check first", "parameters"))(1, 10)
        second(5, 20, note="loss 3.21")
        progress._bars.refresh()
        rows = shown.getvalue().splitlines()[-2:]
        for row, parts in zip(
            rows, (["train second", "5/20", "tokens", "3.21"], ["check first", "1/10"]), strict=True
        ):
            assert all(part in row for part in parts), rows
        first.close()
        shown.truncate(0)
        progress._bars.refresh()
        assert "train second" in shown.getvalue()
        assert "check first" not in shown.getvalue()
    assert progress._bars is None
    with progress.progress("third"):
        pass


@pytest.mark.parametrize(
    ("expected", "said"), [(100.0, r"index: \d/100 s, "), (0.5, r"index: (1/2|2/3|3/4) s, ")], ids=["in time", "late"]
)
def test_a_call_that_reports_nothing_is_shown_by_its_expected_time(expected, said, monkeypatch):
    lines = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=lines, width=120))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    before = set(threading.enumerate())
    with progress.expected("index", expected):
        deadline = time.monotonic() + 20
        while not lines.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert re.match(rf"  {said}\d+ s left", lines.getvalue())
    # Not a count: a thread that an earlier test left may end meanwhile.
    assert set(threading.enumerate()) <= before, "it goes on after the call has ended"
