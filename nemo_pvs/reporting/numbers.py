"""Number formats of the report; a dash stands for unknown values."""

from __future__ import annotations

import math
from collections.abc import Sequence

DASH = "–"
NOT_FINITE = "not finite"
_PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float | None, decimals: int = 2, *, signed: bool = False) -> str:
    """Format a number with ``decimals`` decimals and thousands separators."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return NOT_FINITE
    text = f"{value:{'+' if signed else ''},.{decimals}f}"
    return text.replace("-", "−")


def scientific(value: float | None) -> str:
    """Format a number such as FLOPs as three digits times a power of ten."""
    if value is None or value == 0:
        return DASH if value is None else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}\u00a0×\u00a010{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def format_perplexity(value: float | None) -> str:
    """Format a perplexity: two decimals below 1000, none below ten million, then a power of ten."""
    if value is not None and 1e7 <= value < math.inf:
        return scientific(value)
    return fixed(value, 2 if value is None or value < 1000 else 0)


def unit_of(values: list[float | int | None]) -> tuple[float, str]:
    """Return the divisor and the prefix (k, M, B, T or "") that suit the largest of some counts."""
    largest = max((abs(value) for value in values if value is not None), default=0)
    return next(((size, prefix) for size, prefix in _PREFIXES if largest >= size), (1.0, ""))


def scaled(value: float | int | None, unit: tuple[float, str]) -> str:
    """Format a count in a unit that ``unit_of`` returned."""
    if value is None:
        return DASH
    divisor, prefix = unit
    return fixed(value / divisor, 2 if prefix else 0)


def duration(seconds: float | None) -> str:
    """Format a wall-clock time as hours, minutes and seconds."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def plus_minus(text: str, spread: float | None, decimals: int = 2) -> str:
    """Append what follows ± to a number, if it is known: ``2.54 ± 0.03``."""
    return text if spread is None else f"{text}\u00a0±\u00a0{fixed(spread, decimals)}"


def and_list(names: Sequence[str]) -> str:
    """Join names: ``depth, width and joint``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
