"""What generated text reveals without a reference: repetition, and how soon it departs from another model's."""

from __future__ import annotations

from collections.abc import Sequence


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Return the share of a continuation's n-grams that occurred in it before: seq-rep-n of arXiv 1908.04319.

    It is 1 - distinct / all, where n-grams overlap: 0 if no n-gram occurs twice, and close to 1 in a loop.

    Args:
        ids: Token ids of the continuation, without the prompt.
        n: Length of the n-grams in tokens; a continuation shorter than that repeats nothing.
    """
    grams = _ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(continuations: Sequence[Sequence[int]], n: int) -> float:
    """Return the number of different n-grams in all continuations over the number of their tokens.

    This is distinct-n of arXiv 1510.03055. Unlike ``repetition`` it also falls if different prompts get the same
    continuation. It falls with more text as well, so compare equal numbers of tokens only.

    Args:
        continuations: Token ids of each continuation; n-grams do not cross from one into the next.
        n: Length of the n-grams in tokens.
    """
    tokens = sum(map(len, continuations))
    different = {gram for ids in continuations for gram in _ngrams(ids, n)}
    return len(different) / tokens if tokens else 0.0


def agreement(ids: Sequence[int], reference: Sequence[int]) -> float:
    """Return the share of a reference continuation that another reproduces before the first difference.

    It is the length of their common prefix over the length of the reference: 1 if the whole reference is reproduced.

    Args:
        ids: Token ids of a continuation.
        reference: Token ids of the reference, such as the parent's continuation of the same prompt; not empty.
    """
    common = 0
    for token, expected in zip(ids, reference, strict=False):
        if token != expected:
            break
        common += 1
    return common / len(reference)


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
