"""Another process that works in a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLD = """
import sys
from pathlib import Path
from nemo_pvs.system import folder_lock
folder_lock.BEAT_SECONDS = float(sys.argv[3])
with getattr(folder_lock, sys.argv[1])(Path(sys.argv[2])):
    print("in", flush=True)
    what = sys.stdin.readline().strip()
    if what == "fail":
        raise folder_lock.UserError("a mistake")
    if what == "child":
        import subprocess
        child = "from nemo_pvs.system.folder_lock import locked_folder; from pathlib import Path; import sys"
        child += "\\nwith locked_folder(Path(sys.argv[1])): print('child in')"
        print(subprocess.run([sys.executable, "-c", child, sys.argv[2]], capture_output=True, text=True).stdout)
"""


@contextmanager
def holder(path: Path, kind: str = "locked_folder", beat: float = 0.1) -> Iterator[subprocess.Popen[str]]:
    """Yield another command that works in a folder until a line on its standard input ends it: end, fail or child."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, kind, str(path), str(beat)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout.readline() != "in\n":
            raise AssertionError(process.stderr.read())
        yield process
    finally:
        process.kill()
        process.communicate()
