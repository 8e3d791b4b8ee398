"""Runs whose parents differ only by seed, the choice of learning rates, and the losses on further texts."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.compare.compare import compare, read_runs
from nemo_pvs.reporting.html import write_files
from nemo_pvs.reporting.numbers import scientific
from nemo_pvs.reporting.results import Results, SweepResult
from nemo_pvs.reporting.tables.sweeps import AT_THE_EDGE, sweep_cells, sweep_notes
from nemo_pvs.reporting.tables.texts import text_cells, text_headings

SWEEP = SweepResult("sparse pruned", "wanda", ["wanda"], [1e-4, 1e-3, 1e-2], [3.5, 3.25, 4.0], 1e-3, 3072, 6 * 10**9)


def _save(results: Results, folder: Path, seed: int, *, origin: str | None = "a" * 64, weights: str = "") -> str:
    """Save a run of a seed, whose parent has weights of its own."""
    run = copy.deepcopy(results)
    run.recipe = {"parent": {"source": f"runs/parents/{seed}"}, "train": {"seed": seed}, "data": {"seed": 0}}
    run.hashes["parent weights"] = weights or f"{seed}" * 64
    assert run.parent is not None
    if origin is not None:
        run.parent = replace(run.parent, origin={"recipe": origin, "seed": seed, "data_seed": seed})
    run.save(folder / f"seed-{seed}" / "results.json")
    return str(folder / f"seed-{seed}")


def test_parents_that_differ_only_by_seed_belong_together(results: Results, tmp_path: Path) -> None:
    runs = [_save(results, tmp_path, seed) for seed in (1, 2, 3)]
    assert compare(read_runs(runs)).seeds == 3
    assert compare(read_runs([str(tmp_path)])).seeds == 3


def test_a_sweep_with_a_rate_that_diverged_is_one_sweep(results: Results, tmp_path: Path) -> None:
    results.sweeps = [replace(SWEEP, losses=[3.5, 3.25, math.nan])]
    runs = compare(read_runs([_save(results, tmp_path, seed) for seed in (1, 2, 3)]))
    assert len(sweep_cells(runs)) == 1


@pytest.mark.parametrize(("origin", "weights"), [("b" * 64, "1" * 64), (None, "")])
def test_other_parents_do_not(results: Results, tmp_path: Path, origin: str | None, weights: str) -> None:
    """Neither one that was trained otherwise, nor one with other weights of which nothing is known."""
    runs = [_save(results, tmp_path, 1), _save(results, tmp_path, 2, origin=origin, weights=weights)]
    with pytest.raises(UserError, match=r"not comparable: parent differs"):
        compare(read_runs(runs))


def test_equal_weights_of_which_nothing_is_known_still_do(results: Results, tmp_path: Path) -> None:
    runs = [_save(results, tmp_path, seed, origin=None, weights="1" * 64) for seed in (1, 2)]
    for seed in (1, 2):
        file = tmp_path / f"seed-{seed}" / "results.json"
        values = json.loads(file.read_text())
        values["recipe"]["parent"]["source"] = "the same"
        file.write_text(json.dumps(values))
    assert compare(read_runs(runs)).seeds == 2


def test_a_sweep_is_shown_once_with_its_losses_and_cost(results: Results, tmp_path: Path) -> None:
    results.sweeps = [SWEEP]
    runs = compare(read_runs([_save(results, tmp_path, seed) for seed in (1, 2)]))
    losses = "0.0001: 3.500, 0.001: 3.250, 0.01: 4.000"
    assert sweep_cells(runs) == [["sparse pruned", "wanda", losses, "0.001", "3,072", scientific(6 * 10**9)]]
    assert AT_THE_EDGE not in sweep_notes(runs)
    write_files(runs, tmp_path / "report")
    assert losses in (tmp_path / "report" / "report.html").read_text()
    assert losses in (tmp_path / "report" / "report.md").read_text()
    (shown,) = json.loads((tmp_path / "report" / "report.json").read_text())["learning_rates"]
    assert (shown["chosen"], shown["losses"]) == (1e-3, [3.5, 3.25, 4.0])


@pytest.mark.parametrize("chosen", [1e-4, 1e-2])
def test_a_rate_at_the_edge_is_said_to_be(results: Results, tmp_path: Path, chosen: float) -> None:
    results.sweeps = [replace(SWEEP, chosen=chosen)]
    assert AT_THE_EDGE in sweep_notes(compare(read_runs([_save(results, tmp_path, 1)])))


def test_losses_on_further_texts_are_means_over_seeds(results: Results, tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        run = copy.deepcopy(results)
        assert run.parent is not None
        run.parent.text_losses = {"books": 2.0 + seed, "code": 1.0}
        run.arms[0].text_losses = {"books": 3.0 + seed, "code": 2.0}
        run.arms[1].text_losses = {"books": 4.0}
        folders.append(_save(run, tmp_path, seed))
    runs = compare(read_runs(folders))
    assert text_headings(runs.results) == ["Model", "books", "code"]
    assert text_cells(runs.results)[:3] == [
        ["tiny parent", "3.500", "1.000"],
        ["depth, pruned", "4.500", "2.000"],
        ["depth, scratch", "4.000", "–"],
    ]
    assert text_cells(results) == []
