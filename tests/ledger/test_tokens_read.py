"""What weights have read before is not read again unawares."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.tokens_read import TokensRead

BEFORE = TokensRead("a" * 64, seed=1234, sequence_length=32, first=1024, end=2048)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "--first-token 2048"),
        ({"first": 2047, "end": 4096}, "--first-token 2048"),
        ({"first": 0, "end": 1025}, "--first-token 2048"),
        ({"first": 0, "end": 4096}, "--first-token 2048"),
        ({"first": 1500, "end": 1600}, "already trained on tokens of this data between 1,500 and 1,600;"),
        # Another order of the same tokens: no range of it is known to be new.
        ({"first": 4096, "end": 5120, "seed": 7}, "in another order .--data-seed 1234, --sequence-length 32."),
        ({"first": 4096, "end": 5120, "sequence_length": 64}, "in another order"),
    ],
)
def test_what_was_read_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(BEFORE, **change).check_new([BEFORE])


@pytest.mark.parametrize(
    "change",
    [
        {"first": 2048, "end": 4096},
        {"first": 0, "end": 1024},
        {"data": "b" * 64},
        {"data": "b" * 64, "seed": 7},
    ],
)
def test_what_is_new_is_read(change):
    replace(BEFORE, **change).check_new([BEFORE])
    replace(BEFORE, **change).check_new([])


def test_the_way_out_is_behind_all_that_was_read():
    later = replace(BEFORE, first=4096, end=8192)
    with pytest.raises(UserError, match="--first-token 8192"):
        BEFORE.check_new([BEFORE, later])
