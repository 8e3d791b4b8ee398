"""The documents of the project, and the commands, code spans and examples in them.

Not the changelog, which names what was.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    ROOT / "recipes" / "README.md",
    ROOT / "conversions" / "README.md",
    ROOT / "tests" / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(document: Path, language: str = "") -> list[str]:
    """Return the fenced blocks of a language; commands are in blocks of none, their output is in ``text``."""
    fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [block for named, block in fences if named == language]


def commands(document: Path) -> list[str]:
    """Return the lines of fenced blocks without their comments."""
    lines = "".join(blocks(document)).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def code_spans(document: Path) -> list[str]:
    """Return what stands between single backticks outside fenced blocks."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
