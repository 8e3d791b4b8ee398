from __future__ import annotations

import math

import pytest

from nemo_pvs.reporting.numbers import duration, fixed, format_perplexity, scaled, scientific, unit_of


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (fixed(None), "–"),
        (fixed(0.0), "0.00"),
        (fixed(-1234.567, 1), "−1,234.6"),
        (fixed(0.1, signed=True), "+0.10"),
        (fixed(-0.1, signed=True), "−0.10"),
        (fixed(math.nan), "not finite"),
        (fixed(math.inf), "not finite"),
        (scientific(None), "–"),
        (scientific(0), "0"),
        (scientific(1_764_000_000_000_000_000_000), "1.76\u00a0×\u00a010²¹"),
        (scientific(9.996e3), "1.00\u00a0×\u00a010⁴"),
        (format_perplexity(None), "–"),
        (format_perplexity(999.994), "999.99"),
        (format_perplexity(49152.4), "49,152"),
        (format_perplexity(9_999_999.0), "9,999,999"),
        (format_perplexity(1.308e12), "1.31\u00a0×\u00a010¹²"),
        (format_perplexity(math.inf), "not finite"),
        (duration(None), "–"),
        (duration(3725.6), "1:02:06"),
        (duration(59.6), "0:01:00"),
        (scaled(None, (1e6, "M")), "–"),
        (scaled(1_234_567, (1e6, "M")), "1.23"),
        (scaled(999, (1.0, "")), "999"),
    ],
)
def test_numbers_are_written_the_same_everywhere(written: str, expected: str) -> None:
    assert written == expected


def test_the_unit_suits_the_largest_and_ignores_what_is_unknown() -> None:
    assert unit_of([12_000, None, 3_000_000]) == (1e6, "M")
    assert unit_of([1_000_000_000]) == (1e9, "B")
    assert unit_of([999]) == (1.0, "")
    assert unit_of([None]) == (1.0, "")
