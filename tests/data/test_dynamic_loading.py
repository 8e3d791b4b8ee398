"""Dynamic batch loading against golden vectors, its fixed point, and planted laws."""

import numpy as np
import pytest

from nemo_pvs.data.dynamic_loading import reference_losses, update_proportions
from nemo_pvs.errors import UserError


def test_the_update_is_the_golden_one() -> None:
    assert update_proportions([0.67, 0.33], [2.1, 1.8], [2.0, 2.0]) == pytest.approx([0.732642, 0.267358], abs=1e-6)


def test_losses_at_their_targets_change_nothing_but_the_smoothing() -> None:
    shares = [0.5, 0.3, 0.2]
    found = update_proportions(shares, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], smoothing=1e-3)
    assert found == pytest.approx([(1 - 1e-3) * share + 1e-3 / 3 for share in shares])
    assert update_proportions(shares, [1.0] * 3, [1.0] * 3, smoothing=0) == pytest.approx(shares)


def test_a_domain_twice_as_far_behind_gains() -> None:
    once = update_proportions([0.25] * 4, [2.1, 2.0, 2.0, 2.0], [2.0] * 4)
    twice = update_proportions([0.25] * 4, [2.2, 2.0, 2.0, 2.0], [2.0] * 4)
    assert twice[0] > once[0] > 0.25
    assert sum(once) == pytest.approx(1)
    assert sum(twice) == pytest.approx(1)


def test_a_domain_that_is_ahead_loses_unless_clipped() -> None:
    ahead = ([0.5, 0.5], [1.0, 2.0], [2.0, 2.0])
    assert update_proportions(*ahead)[0] < 0.3
    assert update_proportions(*ahead, clip=True) == pytest.approx([0.5, 0.5])


def test_a_share_never_dies() -> None:
    shares = [0.5, 0.5]
    for _ in range(200):
        shares = update_proportions(shares, [1.0, 9.0], [2.0, 2.0])
    assert shares[0] == pytest.approx(0.5e-4, rel=0.1)


def test_reference_losses_continue_a_planted_law() -> None:
    sizes = np.array([1.5e9, 8e9, 70e9])
    laws = [(1.6, 400.0, 0.3), (0.7, 90.0, 0.25)]
    losses = [[floor + factor / size**exponent for floor, factor, exponent in laws] for size in sizes]
    found = reference_losses(sizes.tolist(), losses, 4.6e9)
    assert found == pytest.approx([floor + factor / 4.6e9**exponent for floor, factor, exponent in laws], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.5, 0.5], [1.0], [1.0, 1.0]), "do not match; give one of each per domain"),
        (([1.0, 0.0], [1.0, 1.0], [1.0, 1.0]), "Leave out a domain without data"),
        (([0.5, 0.5], [1.0, float("nan")], [1.0, 1.0]), "Domain 1 has no validation loss"),
    ],
)
def test_bad_domains_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        update_proportions(*arguments)


def test_two_sizes_make_no_law() -> None:
    with pytest.raises(UserError, match="three or more models"):
        reference_losses([1e9, 8e9], [[2.0], [1.8]], 4e9)
