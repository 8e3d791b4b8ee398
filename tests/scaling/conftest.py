"""Loss curves of models that never were, from laws with known parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from nemo_pvs.scaling.fit import LAWS, Form
from nemo_pvs.scaling.series import Conditions, LossSeries

Draw = Callable[..., list[LossSeries]]

P2 = {"gamma": -1.2, "delta": 0.15, "alpha": 0.3, "beta": 0.4, "N_C": 0.3, "D_C": 0.25, "E": 0.4}
CHINCHILLA = {"alpha": 0.34, "beta": 0.28, "E": 1.69, "A": 0.354, "B": 1.24}
PER_RUN = {"beta": 0.4, "E": 2.3, "B": 0.9}
TRUTH: dict[str, dict[str, float]] = {"p2": P2, "chinchilla": CHINCHILLA, "per-run": PER_RUN}


def draw(
    form: Form,
    *,
    noise: float = 0.0,
    seed: int = 0,
    parents: Sequence[float] = (1, 3, 8, 20),
    ratios: Sequence[float] = (0.15, 0.25, 0.35),
    billions: Sequence[float] = tuple(np.geomspace(0.05, 1, 20)),
) -> list[LossSeries]:
    """Return a series for each parent (billions) and ratio whose losses follow the law up to relative noise."""
    generator = np.random.default_rng(seed)
    tokens = np.array(billions) * 1e9
    series = []
    for parent in parents:
        for ratio in ratios:
            size, parent_loss = round((1 - ratio) * parent * 1e9), 2.6 - 0.2 * np.log(parent)
            at = Conditions(size, parent * 1e9, 1 - size / (parent * 1e9), parent_loss)
            exact = LAWS[form].curve(list(TRUTH[form].values()), at).loss(tokens)
            losses = exact * np.exp(noise * generator.standard_normal(len(tokens)))
            series.append(
                LossSeries(
                    name=f"{parent:g}B at {ratio:g}",
                    tokens=tuple(tokens.tolist()),
                    losses=tuple(losses.tolist()),
                    initialisation="random" if form == "chinchilla" else "pruned",
                    parameters=size,
                    parent_parameters=round(parent * 1e9),
                    parent_loss=float(parent_loss),
                    separate_runs=True,
                )
            )
    return series


@pytest.fixture(scope="session")
def drawn() -> Draw:
    return draw
