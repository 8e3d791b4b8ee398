"""Which weights go: against sorting in Python and against every combination."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.sparse.sparsity import Sparsity, lowest, lowest_in_groups, prunable, up_to_threshold
from tests.state_source import StateSource, tiny_model


def with_ties(*size: int, values: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, values, size, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(
    ("text", "ratio", "pattern"),
    [("0.5", 0.5, None), (".65", 0.65, None), ("2:4", 0.5, (2, 4)), ("4:8", 0.5, (4, 8)), ("3:4", 0.75, (3, 4))],
)
def test_parse(text: str, ratio: float, pattern: tuple[int, int] | None) -> None:
    assert Sparsity.parse(text) == Sparsity(ratio, pattern)
    assert Sparsity.parse(str(Sparsity.parse(text))) == Sparsity(ratio, pattern)


@pytest.mark.parametrize("text", ["", "half", "50%", "2:", ":4", "2:4:8", "0.5:1", "2/4"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="such as"):
        Sparsity.parse(text)


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.5", "nan", "inf", "4:4", "0:4", "5:4", "-1:4", "0:0"])
def test_everything_or_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="removes nothing or leaves nothing"):
        Sparsity.parse(text)


@pytest.mark.parametrize(
    ("text", "weights", "gone"), [("0.29", 100, 29), ("0.35", 14336, 5017), ("0.5", 7, 3), ("0.1", 9, 0)]
)
def test_count(text: str, weights: int, gone: int) -> None:
    """In floating point 100 * 0.29 is just below 29."""
    assert Sparsity.parse(text).count(weights) == gone


def test_rows_must_be_whole_groups() -> None:
    source = StateSource(tiny_model())
    with pytest.raises(UserError, match=r"2:7 needs groups of 7 inputs, but model\.layers\.0\..* has 64"):
        list(prunable(source, Sparsity.parse("2:7")))
    assert source.reads == []


def test_the_matrices_of_the_layers_and_nothing_else() -> None:
    model = tiny_model()
    names = [part.name for entry in prunable(StateSource(model), Sparsity(0.5)) for part in entry.parts]
    linear = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert sorted(names) == sorted(linear)
    inputs = [
        {part.name.split(".")[-2] for part in entry.parts} for entry in prunable(StateSource(model), Sparsity(0.5))
    ]
    for shared in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"o_proj"}, {"down_proj"}):
        assert inputs.count(shared) == 4


@pytest.mark.parametrize("columns", [3, 16, 17, 200])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_lowest_is_a_stable_sort(columns: int, count: int) -> None:
    scores = with_ties(40, columns)
    order = np.argsort(scores.numpy(), axis=1, kind="stable")[:, :count]
    expected = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(expected, order, True, axis=1)
    assert np.array_equal(lowest(scores, count).numpy(), expected)


@pytest.mark.parametrize("columns", [8, 100])
def test_all_and_all_equal(columns: int) -> None:
    assert lowest(with_ties(4, columns), columns).all()
    assert lowest(torch.zeros(4, columns), 3).nonzero()[:, 1].tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (3, 4), (4, 8), (7, 20)])
def test_groups_are_the_cheapest_combination(pattern: tuple[int, int]) -> None:
    zeros, group = pattern
    scores = torch.rand(6, 3 * group, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gone = lowest_in_groups(scores, pattern)
    for row, chosen in zip(scores, gone, strict=True):
        for start in range(0, len(row), group):
            values = row[start : start + group]
            if group <= 8:
                best = min(itertools.combinations(range(group), zeros), key=lambda at: float(values[list(at)].sum()))
            else:
                best = tuple(sorted(sorted(range(group), key=lambda at: float(values[at]))[:zeros]))
            assert tuple(chosen[start : start + group].nonzero().flatten().tolist()) == best


def test_the_published_threshold_takes_one_more_and_all_ties() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [2.0, 5.0, 0.0]])
    assert up_to_threshold(scores, 1).tolist() == [[False, True, False], [False, False, True]]
    assert up_to_threshold(scores, 2).tolist() == [[False, True, True], [True, False, True]]
