"""Commands of Python, each a process of its own, forked from one that has imported what takes long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import Outcome

_SERVER = """
import gc, importlib, json, os, runpy, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
for line in sys.stdin:
    command, variables, *outputs = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(variables)
        for number, output in enumerate(outputs, 1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
        code = 0
        try:
            if command[0] == "-c":
                sys.argv = ["-c", *command[2:]]
                exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
            elif command[0] == "-m":
                sys.argv = command[1:]
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = command
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


class ForkedCommands:
    """Runs what would follow ``python`` on a command line: ``-m MODULE ...``, ``-c CODE ...`` or a script."""

    def __init__(self, server: subprocess.Popen[str], outputs: Path) -> None:
        self._server = server
        self._outputs = outputs

    def __call__(self, *command: object, **variables: str) -> Outcome:
        """Return what a command ends with; ``variables`` are set in its environment."""
        assert self._server.stdin
        assert self._server.stdout
        number = len(os.listdir(self._outputs))
        files = [self._outputs / f"{number}.{name}" for name in ("out", "err")]
        print(json.dumps([list(map(str, command)), variables, *map(str, files)]), file=self._server.stdin, flush=True)
        code = int(self._server.stdout.readline())
        return Outcome(code, *(file.read_text() for file in files))


@contextmanager
def forked_commands(
    folder: Path, *modules: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[ForkedCommands]:
    """Start the process that has imported ``modules``; ``folder``, which must be new, is for what commands print."""
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER, *modules],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd, env={**os.environ, **(environment or {})},
    ) as server:  # fmt: skip
        yield ForkedCommands(server, folder)
        assert server.stdin
        server.stdin.close()
