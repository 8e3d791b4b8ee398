"""The order over domains: by its shares, the same for any split over ranks, and the same after a restart."""

import re

import numpy as np
import pytest

from nemo_pvs.data.domain_order import DomainOrder
from nemo_pvs.errors import UserError

BATCH = 8
NAMES = ("wiki", "code", "mail")


def _order(shares=(0.5, 0.3, 0.2), size: int = 10**6, taken: int = 0) -> DomainOrder:
    return DomainOrder(
        dict.fromkeys(NAMES, size),
        dict(zip(NAMES, shares, strict=True)),
        dict.fromkeys(NAMES, taken),
        batch=BATCH,
        seed=7,
    )


def _samples(order: DomainOrder, first: int, last: int) -> list[tuple[int, int]]:
    return [order.sample(index) for index in range(first * BATCH, last * BATCH)]


def test_domains_have_their_shares_and_no_sample_comes_twice() -> None:
    read = _samples(_order(), 0, 2000)
    counts = np.bincount([domain for domain, _ in read])
    assert counts / len(read) == pytest.approx([0.5, 0.3, 0.2], abs=0.015)  # four standard deviations
    for domain, count in enumerate(counts):
        assert [place for drawn, place in read if drawn == domain] == list(range(count))


def test_ranks_that_share_a_batch_read_what_one_would() -> None:
    whole, halves = _samples(_order(), 0, 50), (_order(), _order())
    shared = [halves[index % 2].sample(index) for index in range(50 * BATCH)]
    assert shared == whole


def test_other_shares_hold_from_their_step_on_whoever_has_read() -> None:
    after = dict(zip(NAMES, (0.01, 0.01, 0.98), strict=True))
    reader, idle = _order(), _order()
    before = _samples(reader, 0, 20)
    for order in (reader, idle):
        order.change(20, after)
    assert before == _samples(_order(), 0, 20)
    assert reader.taken == idle.taken
    read = _samples(reader, 20, 40)
    assert read == _samples(idle, 20, 40)
    assert sum(domain == 2 for domain, _ in read) > 0.9 * len(read)
    places = [place for domain, place in before + read if domain == 2]
    assert places == list(range(len(places)))


def test_a_restored_order_goes_on_bit_for_bit() -> None:
    whole = _order(taken=11)
    whole.change(5, update := dict(zip(NAMES, (0.1 + 1e-16, 0.2, 0.7), strict=True)))
    state, restored = whole.state(9), _order()
    restored.restore(state)
    assert state["step"] == 9
    assert sum(state["taken"].values()) == 3 * 11 + 9 * BATCH
    assert restored.shares == update
    assert _samples(whole, 9, 30) == _samples(restored, 9, 30)
    other = DomainOrder(dict.fromkeys(NAMES, 10**6), whole.shares, state["taken"], batch=BATCH, seed=8)
    assert [domain for domain, _ in _samples(other, 0, 30)] != [domain for domain, _ in _samples(whole, 30, 60)]


def test_what_was_read_ahead_cannot_be_drawn_by_other_shares() -> None:
    order = _order()
    _samples(order, 0, 6)
    with pytest.raises(RuntimeError, match="before its shares were known"):
        order.change(5, order.shares)


def test_a_domain_that_ends_is_named_before_any_of_the_step_is_read() -> None:
    order = _order(size=40)
    with pytest.raises(UserError, match=r"Domain wiki ends before step \d+: it has 40 sequences, but 4\d are") as one:
        _samples(order, 0, 100)
    step = int(re.search(r"step (\d+)", str(one.value)).group(1)) - 1
    assert sum(order.taken.values()) == step * BATCH
