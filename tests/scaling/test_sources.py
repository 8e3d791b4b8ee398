from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.results import Point, Results
from nemo_pvs.scaling.fit import fit
from nemo_pvs.scaling.series import LossSeries
from nemo_pvs.scaling.sources import read_series

from ..reporting.conftest import TOKENS
from ..reporting.conftest import results as results

HEADER = "name,tokens,loss,parameters,initialisation,parent_parameters,parent_loss\n"


def _run(results: Results, folder: Path) -> str:
    results.save(folder / "results.json")
    return str(folder)


def test_a_runs_arms_are_series_without_their_warm_up(results: Results, tmp_path: Path) -> None:
    results.arms[0].masked_parameters = 1000
    series = read_series([_run(results, tmp_path)])
    assert [one.name for one in series] == [f"{tmp_path}: {arm.name}" for arm in results.arms]
    first, arm = series[0], results.arms[0]
    assert first.losses == (2.75, 2.625, 2.54)  # the loss before training is left out
    assert first.tokens == (TOKENS // 3, 2 * TOKENS // 3, TOKENS)
    assert first.parameters == arm.shape.parameters - 1000
    assert first.ratio == 1 - first.parameters / results.parent.shape.parameters
    assert (first.parent_loss, first.initialisation, series[1].initialisation) == (2.4, "pruned", "random")
    assert not first.cut_short


def test_arms_with_three_budgets_are_one_series_of_their_last_losses(results: Results, tmp_path: Path) -> None:
    pruned, random, *others = results.arms
    ladder = []
    for tokens, loss in ((8192, 2.9), (40_960, 2.5), (16_384, 2.7)):
        curve = [Point(0, 0, 4.0), Point(1, tokens // 2, loss + 1), Point(2, tokens, loss)]
        ladder.append(replace(pruned, name=f"depth, pruned, {tokens}", validation=curve))
    results.arms = [*ladder[:2], random, ladder[2], *others]
    first, *rest = read_series([_run(results, tmp_path)])
    assert (first.name, first.tokens, first.losses) == (
        f"{tmp_path}: depth, pruned",
        (8192, 16_384, 40_960),
        (2.9, 2.7, 2.5),
    )
    assert first.separate_runs
    assert not first.cut_short
    assert [series.name for series in rest] == [f"{tmp_path}: {arm.name}" for arm in (random, *others)]
    # With two budgets there is no curve through them, so their own curves are taken.
    results.arms = [*ladder[:2], random]
    assert not any(series.separate_runs for series in read_series([_run(results, tmp_path)]))


def test_losses_per_token_of_different_tokenizers_are_not_fitted_together(results: Results, tmp_path: Path) -> None:
    target = results.arms[0].target
    results.hashes |= {"tokenizer": "a", f"tokenizer of {target}": "b"}
    series = read_series([_run(results, tmp_path)])
    for one, arm in zip(series, results.arms, strict=True):
        assert (one.tokenizer, one.parent_loss) == (("b", None) if arm.target == target else ("a", 2.4))
    with pytest.raises(
        UserError, match=r"have different tokenizers, so their losses per token are not in the same unit"
    ):
        fit("chinchilla", series)


def test_the_seeds_of_a_run_are_read_each(results: Results, tmp_path: Path) -> None:
    for seed in (1, 2):
        (tmp_path / f"seed-{seed}").mkdir()
        _run(results, tmp_path / f"seed-{seed}")
    names = [series.name for series in read_series([str(tmp_path)])]
    assert names == [f"{tmp_path}/seed-{seed}: {arm.name}" for seed in (1, 2) for arm in results.arms]


def test_of_an_arm_made_in_stages_the_last_counts(results: Results, tmp_path: Path) -> None:
    pruned = results.arms[0].validation
    pruned.insert(2, dataclasses.replace(pruned[1], loss=3.25))  # measured before and after it was pruned again
    assert len(read_series([_run(results, tmp_path)])[0].tokens) == 3
    results.recipe["targets"] = {"depth": {"stages": 2}}
    one, other, *_ = read_series([_run(results, tmp_path)])
    assert one.losses == (2.625, 2.54)
    assert len(other.losses) == 3


def test_a_run_that_stopped_early_is_known(results: Results, tmp_path: Path) -> None:
    results.arms[0].validation.pop()
    assert [one.cut_short for one in read_series([_run(results, tmp_path)])] == [True, False, False, False]


def test_a_loss_that_is_no_number_is_refused(results: Results, tmp_path: Path) -> None:
    results.arms[1].validation[2].loss = math.nan
    with pytest.raises(UserError, match=r"depth, scratch has a loss of nan after 27,306 tokens; a run that diverged"):
        read_series([_run(results, tmp_path)])


def test_an_arm_that_cannot_be_fitted_does_not_stop_the_others(results: Results, tmp_path: Path) -> None:
    results.arms[1].validation[2].loss = math.nan
    del results.arms[2].validation[2:]
    results.arms[2].validation[1].tokens = 1
    why: list[str] = []
    series = read_series([_run(results, tmp_path)], why.append)
    assert [one.name for one in series] == [f"{tmp_path}: depth, pruned", f"{tmp_path}: width, scratch"]
    assert "depth, scratch has a loss of nan" in why[0]
    assert "width, pruned has no validation loss" in why[1]


def test_a_run_given_twice_is_refused(results: Results, tmp_path: Path) -> None:
    run = _run(results, tmp_path)
    with pytest.raises(UserError, match="give each run once"):
        read_series([run, run])


def test_a_table_is_series(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(
        HEADER + "a,2e9,2.5,1e9,pruned,2e9,2.2\nb,1e9,3.0,1e9,random,,\na,1e9,2.75,1e9,pruned,2e9,2.2\n"
    )
    a, b = read_series([str(tmp_path / "runs.csv")])
    assert a == LossSeries(
        "a", (1e9, 2e9), (2.75, 2.5), "pruned", 10**9, 2 * 10**9, 2.2, True, source=str(tmp_path / "runs.csv")
    )
    assert (b.initialisation, b.parent_parameters, b.ratio) == ("random", None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,tokens\na,1\n", "lacks the columns loss, parameters"),
        (HEADER + "a,1e9,low,1e9,pruned,,\n", "'a' has a value that is not a number"),
        (HEADER + "a,1e9,2.5,1e9,warm,,\n", "initialisation is 'warm'; write pruned or random"),
        (HEADER + "a,1e9,2.5,1e9,pruned,,\na,2e9,2.4,2e9,pruned,,\n", "rows of 'a' are of different models"),
        (HEADER + "a,0,2.5,1e9,pruned,,\n", "give tokens above 0"),
        (HEADER + "a,1e9,2.5,inf,pruned,,\n", "'a' has a value that is not a number"),
        (HEADER + "a,1e9,2.5,-5,pruned,,\n", "a has -5 parameters; give a number above 0"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "runs.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_series([str(tmp_path / "runs.csv")])


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "none"), str(tmp_path / "none.csv")):
        with pytest.raises(UserError, match="does not exist"):
            read_series([missing])


def test_the_papers_points_are_series_of_separate_runs() -> None:
    series = read_series(["published"])
    assert len(series) == 4
    assert all(one.separate_runs and len(one.tokens) == 5 for one in series)
    assert series[0].ratio == pytest.approx(0.435, abs=5e-4)
    assert dataclasses.asdict(series[0])["losses"] == (2.70, 2.59, 2.54, 2.46, 2.43)


def test_a_table_of_logs(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "logs" / "a")) as writer:
        for steps in (1, 10, 20, 30):
            writer.add_scalar("val_loss", 4 - steps / 20, steps - 1)
    (tmp_path / "runs.csv").write_text("name,log,tokens_per_step,parameters,initialisation\na,logs/a,1e6,1e9,random\n")
    [series] = read_series([str(tmp_path / "runs.csv")])
    assert (series.tokens, series.losses) == ((1e7, 2e7, 3e7), (3.5, 3.0, 2.5)), "the warm-up is left out"
    assert (series.initialisation, series.parameters, series.separate_runs) == ("random", 10**9, False)
    (tmp_path / "runs.csv").write_text("name,log,parameters\na,logs/a,1e9\n")
    with pytest.raises(
        UserError, match="lacks the columns tokens_per_step; it needs name, log, tokens_per_step, param"
    ):
        read_series([str(tmp_path / "runs.csv")])
    with pytest.raises(
        UserError, match=r"logs but no results\.json.* a \.csv table with the columns name, log, tokens_"
    ):
        read_series([str(tmp_path / "logs")])


def test_a_table_that_excel_wrote_begins_with_a_byte_order_mark(tmp_path: Path) -> None:
    rows = HEADER + "".join(
        f"a,{tokens}e9,{loss},1000000,pruned,,\n" for tokens, loss in ((1, 3.0), (2, 2.5), (4, 2.2))
    )
    for name, encoding in (("plain.csv", "utf-8"), ("excel.csv", "utf-8-sig")):
        (tmp_path / name).write_text(rows, encoding=encoding)
    plain, excel = (read_series([str(tmp_path / name)])[0] for name in ("plain.csv", "excel.csv"))
    assert dataclasses.replace(excel, source=plain.source) == plain
