"""A finding of the doctor: one line that says how things are and, if something is wrong, how to fix it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warn", "FAIL"]
"""``FAIL``: training cannot work. ``warn``: it can, but not everything or not as fast. ``note``: good to know."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer."""

    level: Level
    subject: str
    text: str
    fix: str = ""
    """The command, or what to change; empty if nothing is wrong."""

    def line(self) -> str:
        """Return the finding as one line."""
        words = f"{self.level:<4}  {self.subject:<18}  {self.text}"
        return f"{words}; fix: {self.fix}" if self.fix else words


def failed(findings: Iterable[Finding]) -> bool:
    """Return whether training cannot work."""
    return any(finding.level == "FAIL" for finding in findings)


def verdict(findings: Iterable[Finding], *, gpus: int, build: bool = False) -> str:
    """Return the doctor's last line."""
    found = list(findings)
    wrong = sum(finding.level == "FAIL" for finding in found)
    if wrong:
        lines = "the line" if wrong == 1 else f"the {wrong} lines"
        return f"Training cannot work here; see {lines} marked FAIL."
    if build:
        return "This image is complete, as far as one can see without a GPU; run pvs doctor --deep where there is one."
    if gpus:
        return f"Found nothing that would keep {gpus} GPU{'s' * (gpus > 1)} from training; pvs doctor --deep tries it."
    return "There is no GPU, and that is fine: everything works on this CPU, at the sizes of make demo."
