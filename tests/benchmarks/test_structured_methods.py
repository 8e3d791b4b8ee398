"""The benchmark runs, on a model without meaning."""

from __future__ import annotations

import pytest

from nemo_pvs.calibration.engine import calibrate
from tests.benchmarks.structured_methods import plans, row
from tests.calibration.test_engine import token_set
from tests.state_source import StateSource, tiny_model


@pytest.mark.slow
def test_every_method_has_a_row() -> None:
    source, tokens = StateSource(tiny_model(num_key_value_heads=4)), token_set(samples=2)
    scores = calibrate(source, tokens, gradients=True)
    made = plans(scores, 0.3)
    rows = {name: row(source, plan, scores.shape, tokens) for name, plan in {"dense": None, **made}.items()}
    assert len({cells[3] for cells in rows.values()}) > 10
    removed = {name: float(cells[0].rstrip("%")) for name, cells in rows.items()}
    assert removed["dense"] == 0
    assert removed["FLAP, AL-MM, bias"] == pytest.approx(30, abs=1)
