"""The verbs budget, scaling-fit, scaling-predict and advise, as a user types them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nemo_pvs.cli.main import main
from nemo_pvs.reporting.results import Point, Results

from ..reporting.conftest import results as results
from ..scaling.conftest import Draw

Pvs = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pvs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pvs:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pvs", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return (code, *capsys.readouterr())

    return run


def _refused(outcome: tuple[int, str, str], sentence: str) -> None:
    code, _, errors = outcome
    assert code == 2
    assert sentence in errors
    assert errors.startswith("pvs: ")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_fit_and_predict_on_the_papers_points(pvs: Pvs, tmp_path: Path) -> None:
    fit = tmp_path / "fit.json"
    code, out, _ = pvs("scaling-fit", "published", "--out", fit, "--draws", 39)
    assert code == 0
    assert "without the last 20 % of tokens (1 point)" in out
    assert out.count("rmse") == 8  # of the fit and of what was held out, for each arm
    assert fit.exists()
    assert (tmp_path / "fit.svg").read_text().startswith("<?xml")
    scratch = "minitron-width, random (arXiv 2606.14150)"
    questions = ("--tokens", "100e9", "--target-loss", 2.4, "--gain", 0.001, "--against", scratch)
    code, out, _ = pvs("scaling-predict", fit, *questions, "--run", "minitron-width, pruned (arXiv 2606.14150)")
    assert code == 0
    assert "loss after 100 B tokens: 2.4" in out
    assert "another billion tokens gains less than 0.001 nats from: 6" in out
    assert "catches up: at 4.0" in out
    assert out.count("are outside the fitted") == 1, "where they meet is far beyond the points"
    depth = ("--run", "minitron-depth, pruned (arXiv 2606.14150)", "--parent-tokens", "200e9")
    code, out, _ = pvs("scaling", "predict", fit, "--against", scratch, *depth)
    assert code == 0
    assert "catches up: at or before 10.5 B tokens" in out
    assert "has 4,540,469,248 parameters" in out
    assert "two architectures" in out
    code, out, _ = pvs("scaling", "predict", fit, "--against", scratch, *depth[:2], "--parent-tokens", "5e12")
    assert code == 0
    assert "5,010,485,760,000 tokens are outside the fitted" in out, "scratch is extrapolated, though the other is not"


def test_scratch_of_another_tokenizer_is_not_compared(pvs: Pvs, results: Results, tmp_path: Path) -> None:
    for arm in results.arms:
        arm.validation = [Point(step, step * 4096, 2 + 3 / (1 + step)) for step in range(11)]
    results.hashes |= {"tokenizer": "a", "tokenizer of width": "b"}
    results.save(tmp_path / "results.json")
    fit, scratch = tmp_path / "fit.json", f"{tmp_path}: width, scratch"
    assert pvs("scaling", "fit", tmp_path, "--out", fit, "--draws", 39)[0] == 0
    code, out, _ = pvs("scaling", "predict", fit, "--against", scratch)
    assert code == 0
    assert f"{tmp_path}: depth, pruned have different tokenizers" in out
    assert out.count("catches up") == 1
    code, _, errors = pvs("scaling", "predict", fit, "--against", scratch, "--run", f"{tmp_path}: depth, pruned")
    assert code == 2
    assert "have different tokenizers, so their losses per token are not in the same unit" in errors


def test_a_run_with_an_arm_that_diverged(pvs: Pvs, results: Results, tmp_path: Path) -> None:
    results.arms[0].validation[2].loss = float("nan")
    results.save(tmp_path / "results.json")
    options = ("--draws", 39, "--initialisation", "random")
    del results.arms[3].validation[1:]
    code, out, errors = pvs("scaling", "fit", tmp_path, "--out", tmp_path / "fit.json", *options)
    assert code == 2, errors  # three points do not determine three parameters
    assert "depth, pruned has a loss of nan after 27,306 tokens; a run that diverged cannot be fitted" in out
    assert "3 points do not determine" in errors


@pytest.mark.slow
def test_the_p2_law_from_a_table(pvs: Pvs, drawn: Draw, tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    with open(table, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "tokens", "loss", "parameters", "initialisation", "parent_parameters", "parent_loss"])
        for one in drawn("p2", noise=0.003):
            for tokens, loss in zip(one.tokens, one.losses, strict=True):
                rows.writerow(
                    [one.name, tokens, loss, one.parameters, "pruned", one.parent_parameters, one.parent_loss]
                )
    fit = tmp_path / "fit.json"
    code, out, _ = pvs("scaling-fit", table, "--form", "p2", "--out", fit, "--draws", 39)
    assert code == 0
    assert "without the largest ratio (80 points)" in out
    (asked,) = drawn("p2", parents=(5,), ratios=(0.3,), billions=(0.7,))
    model = ("--params", asked.parameters, "--parent-params", 5e9, "--parent-loss", asked.parent_loss)
    code, out, _ = pvs("scaling-predict", fit, "--tokens", 0.7e9, *model)
    assert code == 0
    loss = float(out.split("loss after 0.7 B tokens: ")[1].split()[0])
    assert loss == pytest.approx(np.array(asked.losses)[0], rel=0.005)
    _refused(pvs("scaling-predict", fit, "--tokens", 0.7e9), "needs to know the parent's parameters and loss")


def test_what_cannot_be_fitted_or_asked_is_refused(pvs: Pvs, tmp_path: Path) -> None:
    fit = tmp_path / "fit.json"
    _refused(pvs("scaling-fit", "published", "--form", "p3"), "--form is 'p3'; choose p2, chinchilla or per-run.")
    _refused(pvs("scaling-fit", "published", "--form", "p2", "--out", fit), "at least 2 parents and 2 ratios")
    _refused(pvs("scaling-fit", "published", "--draws", 5), "use at least 39")
    _refused(pvs("scaling-fit", "published", "--draws", 39, "--seed", -1), "The seed -1 is negative; give 0 or more")
    _refused(pvs("scaling-fit", tmp_path / "none"), "does not exist")
    (tmp_path / "file").write_text("")
    _refused(pvs("scaling-fit", tmp_path / "file"), "does not exist")
    _refused(pvs("scaling-predict", tmp_path, "--tokens", 1), "cannot be read (Is a directory)")
    assert not fit.exists()
    _refused(pvs("scaling-predict", fit, "--tokens", 1), "does not exist")
    _refused(pvs("scaling-predict", fit), "Nothing to predict")


def test_advice_on_the_command_line(pvs: Pvs, results: Results, tmp_path: Path) -> None:
    question = ("advise", "--params", "4e9", "--train-tokens", "50e9", "--parent-tokens", "15e12")
    code, out, _ = pvs(*question)
    assert code == 0
    assert "Assuming a parent of 8B parameters" in out
    assert "At equal training tokens (parent in hand): prune, by width (likely)" in out
    assert "[arXiv 2606.14150, Figure 1 left]" in out
    assert "At equal total tokens (parent charged): unknown" in out
    _refused(pvs(*question, "--parent-params", "3e9"), "give a larger --parent-params")
    _refused(pvs("advise", "--params", "nan", "--train-tokens", 1), "nan parameters make no sense")
    _refused(pvs("advise", "--params", 1, "--train-tokens", "inf"), "inf training tokens make no sense")

    results.save(tmp_path / "results.json")
    arm = results.arms[0]
    own = ("--params", arm.shape.parameters, "--parent-params", results.parent.shape.parameters)
    code, out, _ = pvs("advise", *own, "--train-tokens", 40_000, "--runs", tmp_path)
    assert code == 0
    assert "prune, by depth" in out
    assert "your run 'Half the size' (tiny/demo)" in out


def test_budget_of_a_run(pvs: Pvs, results: Results, tmp_path: Path) -> None:
    results.recipe = {"train": {"sequence_length": 64, "global_batch_size": 8}}
    results.save(tmp_path / "results.json")
    code, out, _ = pvs("budget", tmp_path)
    results.save(tmp_path / "seeds" / "seed-1" / "results.json")
    assert pvs("budget", tmp_path / "seeds") == (0, out, "")
    assert code == 0
    total = 10**9 + 2048 + 40_960
    steps = -(-total // 512)
    assert f"{total:,}" in out
    assert "in whole steps of 512 tokens" in out
    assert [f"{steps * 512:,}", f"{steps:,}"] == out.splitlines()[2].split()[-2:]
    _refused(pvs("budget", tmp_path, "--setting", "equal-love"), "There is no setting 'equal-love'")
    results.recipe = {}
    results.save(tmp_path / "results.json")
    _refused(pvs("budget", tmp_path), "do not state the tokens per training step")
