"""The page, its JSON, its CSV and its Markdown say the same; the command writes all of them."""

from __future__ import annotations

import copy
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nemo_pvs.cli.results import report
from nemo_pvs.errors import UserError
from nemo_pvs.planning.pruned_arms import pruned_arms
from nemo_pvs.reporting.compare.compare import compare
from nemo_pvs.reporting.compare.estimates import gap_curve
from nemo_pvs.reporting.compare.runs import Run, SideBySide
from nemo_pvs.reporting.figures.gap import gap_against_ratio, gap_against_tokens, published_gaps
from nemo_pvs.reporting.figures.loss import loss_panels
from nemo_pvs.reporting.html import write_report
from nemo_pvs.reporting.results import Results
from nemo_pvs.scaling.evidence import Question, own_evidence
from nemo_pvs.scaling.sources import read_series

from .conftest import PARENT
from .evaluated import write_evaluation
from .test_compare_tasks import ANSWERS, MODELS


class _Tables(HTMLParser):
    """Collects tables by the heading above them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self.heading, self.into = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.found.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.found[self.heading][-1].append("")
        if tag in ("h2", "td", "th"):
            self.into = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self.into:
            self.into = ""

    def handle_data(self, data: str) -> None:
        if self.into == "h2":
            self.heading += data
        elif self.into:
            self.found[self.heading][-1][-1] += data


def _number(cell: str) -> list[float]:
    """Return the numbers of a cell: value, and deviation or error."""
    text = cell.replace("−", "-").replace(",", "").replace("*", "").replace("\u00a0", "")
    return [float(part) for part in text.split("±")]


def _close(cell: str, values: list[float | None], factor: float = 1, decimals: int = 2) -> bool:
    known = [factor * value for value in values if value is not None]
    return _number(cell) == pytest.approx(known, abs=0.51 * 10**-decimals)


def _with_half_width(row: dict[str, Any], name: str) -> list[float]:
    """Return the mean and half of the 95 % interval."""
    return [row[name], (row[f"{name}_high"] - row[f"{name}_low"]) / 2]


def _one(results: Results) -> SideBySide:
    return compare([Run("runs/demo", results)])


@pytest.fixture
def folders(results: Results, tmp_path: Path) -> list[str]:
    """Two seeds of a run, the first evaluated, both without one arm."""
    results.hashes |= MODELS
    del results.arms[3]
    results.save(tmp_path / "one" / "results.json")
    write_evaluation(tmp_path / "one" / "evaluation", ANSWERS)
    write_evaluation(tmp_path / "more", {"d" * 64: ANSWERS["c" * 64], "e" * 64: ANSWERS["b" * 64]})
    other = copy.deepcopy(results)
    other.recipe["train"]["seed"] = 2
    other.hashes |= {"model depth-pruned": "d" * 64, "model depth-scratch": "e" * 64}
    for index, arm in enumerate(other.arms):
        arm.test_perplexity_after = 47.0
        for point in arm.validation:
            point.loss += 0.1 * (index + 1)
    other.save(tmp_path / "two" / "results.json")
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def _read(folder: Path) -> tuple[dict[str, list[list[str]]], Any]:
    return _Tables((folder / "report.html").read_text()).found, json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_the_numbers_of_the_page_are_those_of_the_json(folders: list[str], tmp_path: Path) -> None:
    report(folders, out=str(tmp_path / "out"), evaluation=[str(tmp_path / "more")])
    tables, data = _read(tmp_path / "out")
    main = tables["Results"][3:]
    assert len(main) == len(data["arms"]) == 4
    for cells, row in zip(main, data["arms"], strict=True):
        if row["runs"] == 0:
            assert cells == ["width, random (missing)", *["–"] * 12]
            continue
        assert cells[0] == row["arm"]
        assert _close(cells[1], [row["parameters"] / 1e3])
        assert _close(cells[2], [row["removed"]], 100, 1)
        assert _close(cells[6], [row["training_tokens"] / 1e3])
        assert _close(cells[9], _with_half_width(row, "validation_loss"))
        assert cells[10] == "–" if row["gap"] is None else _close(cells[10], _with_half_width(row, "gap"))
        assert _close(cells[12], _with_half_width(row, "test_perplexity_after"))
        assert row["runs"] == 2
    assert data["arms"][0]["validation_loss_deviation"] == pytest.approx(0.1 / 2**0.5)
    rows = data["averages"] + data["tasks"]
    assert len(rows) == 5
    for cells, row in zip(tables["Tasks"][1:], rows, strict=True):
        factor, decimals = (1, 2) if row["task"].endswith("loss") else (100, 1)
        assert cells[:3] == [row["task"], row["pruned_arm"], "–"]
        for cell, name in zip(cells[3:6], ("pruned", "scratch", "difference"), strict=True):
            assert _close(cell, [row[name], row[f"{name}_stderr"]], factor, decimals), name
        assert cells[5].endswith("*") == row["paired"]
        assert cells[6] == row["winner"]


def test_a_report_leaves_no_table_of_an_earlier_one(folders: list[str], results: Results, tmp_path: Path) -> None:
    report(folders, out=str(tmp_path / "report"), evaluation=[str(tmp_path / "more")])
    assert {"equal_terms.csv", "tasks.csv"} <= {file.name for file in (tmp_path / "report").iterdir()}
    results.arms = results.arms[1:2]
    results.save(tmp_path / "alone" / "results.json")
    report([str(tmp_path / "alone")], out=str(tmp_path / "report"))
    assert not {"equal_terms.csv", "tasks.csv"} & {file.name for file in (tmp_path / "report").iterdir()}


@pytest.mark.slow
def test_csv_and_markdown_say_the_same(folders: list[str], tmp_path: Path) -> None:
    report(folders, out=str(tmp_path), evaluation=[str(tmp_path / "more")])
    tables, data = _read(tmp_path)
    files = {"report.csv": data["arms"], "equal_terms.csv": data["equal_terms"]}
    for name, expected in {**files, "tasks.csv": data["averages"] + data["tasks"]}.items():
        with open(tmp_path / name, newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows == [{key: "" if value is None else str(value) for key, value in row.items()} for row in expected]
    lines = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for row in [*tables["Results"][2:], *tables["Tasks"]]:
        assert [cell.strip() for cell in row] in cells


@pytest.mark.slow
def test_every_run_has_its_settings_hashes_and_environment(folders: list[str], tmp_path: Path) -> None:
    report(folders, out=str(tmp_path / "out"))
    tables, data = _read(tmp_path / "out")
    for folder, run in zip(folders, data["runs"], strict=True):
        assert ["recipe", "ab" * 32] in tables[f"Hashes (SHA-256) of {folder}"]
        assert ["torch", "2.13.0"] in tables[f"Environment of {folder}"]
        assert Results.from_json(run["results"]) == Results.load(Path(folder) / "results.json")
    assert [run["seed"] for run in data["runs"]] == [None, 2]
    assert f"pvs report {' '.join(folders)}" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_one_run_is_reported_in_its_own_folder(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "results.json")
    before = (tmp_path / "results.json").read_bytes()
    report([str(tmp_path)])
    assert (tmp_path / "results.json").read_bytes() == before
    tables, data = _read(tmp_path)
    assert "Tasks" not in tables
    assert data["warnings"] == []
    assert not (tmp_path / "tasks.csv").exists()


@pytest.mark.slow
def test_force_marks_the_page(folders: list[str], tmp_path: Path) -> None:
    other = Results.load(Path(folders[1]) / "results.json")
    other.hashes["parent weights"] = "0" * 64
    other.save(Path(folders[1]) / "results.json")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="parent differs"):
        report(folders, out=str(out))
    assert not out.exists()
    report(folders, out=str(out), force=True)
    for name in ("report.html", "report.md", "report.json"):
        assert "These runs are not comparable" in (out / name).read_text()


@pytest.mark.slow
def test_masked_runs_have_both_counts_of_flops(results: Results, tmp_path: Path) -> None:
    arm = results.arms[0]
    arm.shape, arm.masked_parameters = PARENT, 10_000
    arm.ledger.charge("training", 40_960, PARENT, 64, training=True, masked_parameters=10_000)
    results.save(tmp_path / "results.json")
    report([str(tmp_path)])
    tables, data = _read(tmp_path)
    assert tables["Ledger"][0] == ["Activity", "Tokens", "FLOPs, dense", "FLOPs, zeros skipped", "Note"]
    row = data["arms"][0]
    assert row["training_flops"] - row["training_flops_zeros_skipped"] == 40_960 * 6 * 10_000


@pytest.mark.slow
def test_pictures_have_words_and_ids_are_unique(folders: list[str], tmp_path: Path) -> None:
    report(folders, out=str(tmp_path), evaluation=[str(tmp_path / "more")], published=True)
    page = (tmp_path / "report.html").read_text()
    figures = re.findall(r"<svg [^>]*>", page)
    assert len(figures) == 5  # two targets, accuracy, two gaps
    assert all('role="img"' in figure and re.search(r'aria-label="[^"]{20}', figure) for figure in figures)
    ids = [name for name in re.findall(r'\sid="([^"]+)"', page) if re.search(r"axes_|figure_", name)]
    assert len(ids) == len(set(ids)) > 0
    for name in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert f'id="{name}"' in page
    assert "mathdefault" not in page


@pytest.mark.slow
def test_a_missing_arm_and_the_seeds_show_in_the_figure(results: Results) -> None:
    del results.arms[3]
    plain = loss_panels(results)
    assert "width, random: missing" in plain[1]
    assert "missing" not in plain[0]
    bars = loss_panels(results, {"depth, pruned": {40_960: 0.25}})
    assert bars[0] != plain[0]
    assert bars[1] == plain[1]


def test_the_gap_is_drawn_where_both_were_measured(results: Results) -> None:
    arm = results.arms[0]
    assert [value.mean for _, value in gap_curve(_one(results), arm)] == pytest.approx([0.25, 0.125, 0.10])
    results.arms[1].validation[2].loss = float("nan")
    runs = _one(results)
    assert [tokens for tokens, _ in gap_curve(runs, arm)] == [13653, 40960]
    for figure in (*gap_against_tokens(runs), gap_against_ratio(runs)):
        assert "depth, pruned +0.10, width, pruned −0.20" in figure
        ElementTree.fromstring(figure)
    results.arms = results.arms[1::2]
    assert (gap_against_tokens(_one(results)), gap_against_ratio(_one(results))) == ([], "")


def test_the_papers_gaps_are_those_of_its_points(results: Results) -> None:
    depth = next(points for name, points in published_gaps().items() if "depth" in name)
    tokens, gaps, removed = zip(*depth, strict=True)
    assert tokens[0] == 2500 * 4_194_304
    assert gaps == pytest.approx([0.39, 0.22, 0.10, 0.03, 0.04])
    assert set(removed) == {1 - 4_540_469_248 / 8_030_261_248}
    assert "arXiv 2606.14150" in gap_against_tokens(_one(results), reference=True)[0]
    assert "arXiv 2606.14150" not in gap_against_tokens(_one(results))[0]


@pytest.mark.slow
def test_a_run_that_trained_a_parent_has_a_report_of_its_own(results: Results, tmp_path: Path) -> None:
    """Without a pruned model, a gap, or anything removed; and seeds of it are repetitions as of any other."""
    results.parent = None
    results.recipe["train"] |= {"sequence_length": 64, "global_batch_size": 8}
    results.recipe["targets"] = {"p200": {"method": "dense"}}
    arm = results.arms[1]
    arm.name, arm.target, arm.method, arm.shape = "p200, random", "p200", "dense", PARENT
    results.arms = [arm]
    folder = tmp_path / "run"
    write_report(results, folder)
    assert Results.load(folder / "results.json") == results
    report([str(folder)])
    tables, data = _read(folder)
    page = (folder / "report.html").read_text()
    assert "Trained from random weights: p200, random ended at 2.64 nats per token." in page
    assert "It took 40,960 tokens and 3.49 × 10¹⁰ FLOPs (p200, random)." in page.replace("\u00a0", " ")
    assert not re.search("parent|[Gg]ap:|missing", page.split("<main>")[1].split("<h2>Ledger</h2>")[0])
    (row,) = tables["Results"][2:]
    assert (row[0], row[2], row[9], row[10]) == ("p200, random", "–", "2.64", "–")
    assert (data["parent"], data["arms"][0]["removed"], data["warnings"]) == (None, None, [])
    with pytest.raises(UserError, match="no pruned arm"):
        pruned_arms(str(folder))
    (series,) = read_series([str(folder)])
    assert (series.parent_parameters, series.ratio) == (None, None)
    assert own_evidence(Question(1e9, 1e9, 2e9), [results]) == []

    other = copy.deepcopy(results)
    other.recipe["train"]["seed"] = 2
    write_report(other, tmp_path / "two")
    report([str(folder), str(tmp_path / "two")], out=str(tmp_path / "both"))
    assert "2.64 ± 0.00" in (tmp_path / "both" / "report.md").read_text().replace("\u00a0", " ")
