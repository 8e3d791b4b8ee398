"""Repetition, distinct n-grams and agreement, on continuations whose values are known."""

from __future__ import annotations

import random

import pytest

from nemo_pvs.evaluation.degeneration import agreement, distinct, repetition


def test_nothing_repeats_in_different_tokens() -> None:
    assert repetition(range(100)) == 0.0
    assert repetition([5, 5, 5]) == 0.0, "no n-gram, no repetition"
    assert repetition([]) == 0.0


@pytest.mark.parametrize(("period", "length"), [(1, 64), (3, 64), (10, 32)])
def test_a_loop_has_as_many_ngrams_as_its_period(period: int, length: int) -> None:
    loop = [position % period for position in range(length)]
    assert repetition(loop, 4) == pytest.approx(1 - period / (length - 3))


def test_one_repeated_ngram_counts_once() -> None:
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4], 4) == pytest.approx(1 / 6)
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4], 1) == pytest.approx(4 / 9)


def test_distinct_ngrams_are_counted_over_all_continuations() -> None:
    assert distinct([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 6)
    assert distinct([[1, 2], [3, 4]], 2) == pytest.approx(2 / 4), "2, 3 is no n-gram"
    assert distinct([[1, 2, 3]] * 10, 1) == pytest.approx(3 / 30), "each alone repeats nothing"
    assert distinct([[], []], 1) == 0.0


def test_one_continuation_has_both_from_the_same_count() -> None:
    drawn = random.Random(0)
    for _ in range(20):
        ids = [drawn.randint(0, 5) for _ in range(drawn.randint(4, 40))]
        for n in (1, 2, 4):
            grams = len(ids) - n + 1
            assert 1 - repetition(ids, n) == pytest.approx(distinct([ids], n) * len(ids) / grams)


def test_agreement_is_the_common_prefix_over_the_reference() -> None:
    reference = [7, 8, 9, 0]  # 0 ends the text
    assert agreement(reference, reference) == 1.0
    assert agreement([7, 8, 1, 0], reference) == 0.5, "what follows the first difference does not count"
    assert agreement([1, 8, 9, 0], reference) == 0.0
    assert agreement([7, 8, 0], reference) == 0.5, "it stops earlier"
    assert agreement([7, 8, 9, 3, 4, 5], reference) == 0.75, "it goes on"
    assert agreement([], reference) == 0.0
