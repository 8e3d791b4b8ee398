from __future__ import annotations

import math

import numpy as np
import pytest

from nemo_pvs.scaling.chinchilla import Chinchilla
from nemo_pvs.scaling.curve import Curve
from nemo_pvs.scaling.p2 import P2
from nemo_pvs.scaling.per_run import PerRun
from nemo_pvs.scaling.series import Conditions

CURVE = Curve(2.3, 0.8, 0.5)


def test_a_curve_by_hand() -> None:
    assert CURVE.loss(4e9) == pytest.approx(2.3 + 0.8 / 2)
    assert CURVE.tokens_to(2.3 + 0.8 / 2) == pytest.approx(4e9)
    assert CURVE.tokens_to(2.3) == math.inf
    # -dL/dD = 0.4 D^-1.5 nats a billion: 0.05 where D is 4.
    assert CURVE.slope(4e9) == pytest.approx(-0.05)
    assert CURVE.tokens_at_gain(0.05) == pytest.approx(4e9)
    assert Curve(2.3, 0.8, 0.02).tokens_to(2.3 + 1e-12) == math.inf  # more than a double counts


def test_the_slope_is_the_derivative_of_the_loss() -> None:
    tokens = np.geomspace(1e8, 1e12, 9)
    numeric = (CURVE.loss(tokens * 1.0001) - CURVE.loss(tokens * 0.9999)) / (tokens * 0.0002 / 1e9)
    np.testing.assert_allclose(CURVE.slope(tokens), numeric, rtol=1e-6)


def test_scratch_overtakes_where_the_curves_cross() -> None:
    pruned, scratch = Curve(2.4, 0.5, 0.5), Curve(2.3, 1.5, 0.5)
    # 2.4 + 0.5 / x = 2.3 + 1.5 / x with x the root of D: x = 10, D = 100 B.
    assert scratch.overtakes(pruned, 1e9, 1e13) == pytest.approx(100e9)
    assert scratch.overtakes(pruned, 1e9, 50e9) is None
    assert scratch.overtakes(pruned, 200e9, 1e13) == 200e9
    assert pruned.overtakes(scratch, 1e9, 1e13) is None


def test_a_head_start_moves_the_crossing() -> None:
    pruned, scratch = Curve(2.4, 0.5, 0.5), Curve(2.3, 1.5, 0.5)
    met = scratch.overtakes(pruned, 1e8, 1e13, head_start=20e9)
    assert met is not None
    assert met < 100e9
    assert scratch.loss(met + 20e9) == pytest.approx(pruned.loss(met), abs=1e-9)


def test_the_laws_by_hand() -> None:
    at = Conditions(parameters=4e9, parent_parameters=16e9, ratio=0.25, parent_loss=2.0)
    # rho^-gamma = 0.25^0.5 = 0.5; N0^-delta = 1/4; N_C / N0^0.25 = 0.6 / 2; D_C / D^0.5 = 0.8 / 2 after 4 B tokens.
    law = P2().curve([-0.5, 0.5, 0.25, 0.5, 0.6, 0.8, 0.1], at)
    assert law.loss(4e9) == pytest.approx(2.0 + 0.125 * (0.3 + 0.4 + 0.1))
    chinchilla = Chinchilla().curve([0.5, 0.25, 1.7, 0.4, 0.2], at)
    assert chinchilla.loss(16e9) == pytest.approx(1.7 + 0.2 + 0.1)
    assert PerRun().curve([0.5, 2.0, 0.6], Conditions()).loss(9e9) == pytest.approx(2.2)


def test_chinchilla_has_the_constants_of_its_paper() -> None:
    # E 1.69, A 406.4, B 410.7, alpha 0.34, beta 0.28 count single parameters and tokens (2203.15556, equation 10).
    a, b = 406.4 * 1e9**-0.34, 410.7 * 1e9**-0.28
    curve = Chinchilla().curve([0.34, 0.28, 1.69, a, b], Conditions(parameters=70e9))
    assert curve.loss(1.4e12) == pytest.approx(1.69 + 406.4 * 70e9**-0.34 + 410.7 * 1.4e12**-0.28)


def test_the_p2_law_rises_with_the_ratio_and_falls_to_the_parent() -> None:
    values = [-1.2, 0.15, 0.3, 0.4, 0.3, 0.25, 0.4]
    losses = [P2().curve(values, Conditions(1e9, 2e9, ratio, 2.5)).loss(1e9) for ratio in (1e-9, 0.1, 0.2, 0.3)]
    assert losses == sorted(losses)
    assert losses[0] == pytest.approx(2.5, abs=1e-6)
