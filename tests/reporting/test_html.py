from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.reporting.compare.compare import compare
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.html import html_report, write_report
from nemo_pvs.reporting.results import Results

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Page(HTMLParser):
    """Collects the cells of every table, and fails on a tag that is closed in the wrong place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "action", "srcset"}]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.tables[-1][-1][-1] += data


def _page(results: Results) -> str:
    return html_report(compare([Run("demo", results)]))


def test_the_page_holds_every_arm_everywhere(results: Results) -> None:
    main, budgets, runs, ledger, environment, hashes = _Page(_page(results)).tables
    names = [arm.name for arm in results.arms]
    assert [row[0] for row in main[2:]] == ["tiny parent (parent)", *names]
    assert {len(row) for row in main[2:]} == {13}
    assert [row[1] for row in budgets[1:]] == ["depth", "width"]
    assert [row[0] for row in runs[1:]] == names
    assert {len(row) for row in runs} == {11}
    assert runs[1][1:] == [*("minitron-depth", "pruned parent", "2", "1", "3", "3", "0.0003", "2.54", "1:02:05", "11")]
    assert [row[0] for row in ledger if len(row) == 1] == names
    assert ledger[2][:2] == ["parent pretraining", "1,000,000,000"]
    assert ledger[5] == ["total", "1,000,043,008", "1.32\u00a0×\u00a010¹⁵", "without evaluation"]
    assert environment == [["torch", "2.13.0"]]
    assert hashes == [["recipe", "ab" * 32]]


@pytest.mark.slow
def test_heading_groups_span_their_columns(results: Results) -> None:
    text = _page(results)
    head = text[text.index("<thead>") : text.index("</thead>")]
    spans = [int(span) for span in re.findall(r'colspan="(\d+)"', head)]
    assert sum(spans) + head.count('rowspan="2"') == 13
    assert len(_Page(text).tables[0][1]) == sum(spans)


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(results: Results) -> None:
    page = _Page(_page(results))
    assert all(link.startswith("#") for link in page.links)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    text = _page(results)
    assert "http" not in text
    assert "url(http" not in text
    assert "@import" not in text


def test_dark_light_and_paper_are_provided_for(results: Results) -> None:
    text = _page(results)
    for rule in ("prefers-color-scheme: dark", "@media print", "size: A4", "tabular-nums"):
        assert rule in text


@pytest.mark.slow
def test_the_page_is_the_same_in_every_locale(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    page, read = _page(results), Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, encoding=None, errors=None: read(self, encoding or "latin-1", errors)
    )
    assert _page(results) == page


def test_what_users_write_is_shown_and_not_obeyed(results: Results) -> None:
    results.title = "<script>alert(1)</script>"
    results.arms[0].name = results.arms[0].target = "<img src=x>"
    results.hashes = {"<b>": "<i>"}
    results.recipe = {"key": "</code><script>"}
    page = _Page(_page(results))
    assert not page.tags & {"script", "img", "b", "i"}
    assert page.tables[0][3][0] == "<img src=x>"
    assert page.tables[5] == [["<b>", "<i>"]]


def test_nothing_measured_is_a_page_of_dashes(results: Results) -> None:
    for arm in results.arms:
        arm.validation, arm.training, arm.parallel, arm.ledger = [], [], {}, Ledger()
        arm.test_perplexity_before = arm.test_perplexity_after = arm.seconds = arm.tokens_per_second = None
    results.parent.validation_loss = results.parent.test_perplexity = None
    results.environment, results.hashes = {}, {}
    text = _page(results)
    main, budgets, runs, ledger, environment, hashes = _Page(text).tables
    assert "<figure>" not in text
    for row in budgets[1:]:
        assert [row[4], *row[6:]] == ["–"] * 6
    for row in main[3:]:
        assert row[5:] == ["–"] * 8
    for row in runs[1:]:
        assert row[3:] == ["–"] * 8
    assert [row[1:3] for row in ledger if row[0] == "total"] == [["–", "–"]] * 4
    assert environment == hashes == [["–"]]


@pytest.mark.slow
def test_the_files_are_written_and_replaced(results: Results, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    write_report(results, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("equal_terms.csv", "loss.svg", "report.csv", "report.html", "report.json", "report.md", "results.json")
    ]
    assert Results.load(folder / "results.json") == results
    assert (folder / "report.html").read_text() == _page(results)
    results.title = "Another title"
    write_report(results, folder)
    assert "Another title" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_the_markdown_says_the_same(results: Results, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Half the size\n\n**At equal training tokens, on depth pruning won by 0.10")
    main, budgets = _Page(_page(results)).tables[:2]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert rows[2 : len(main)] == main[2:]
    assert [rows[len(main)], *rows[len(main) + 2 :]] == budgets
    recipe = text[text.index("```yaml\n") + 8 : text.rindex("```")]
    assert yaml.safe_load(recipe) == results.recipe
    assert "`pvs run recipe.yaml --out again`" in text


def test_a_folder_that_cannot_be_written_is_named(results: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)):
        write_report(results, tmp_path / "file" / "report")


def test_gpu_use_has_columns_only_if_it_was_measured(results: Results) -> None:
    assert "MFU" not in html_report(compare([Run("run", results)]))
    results.arms[0] = replace(results.arms[0], mfu=0.412, peak_gigabytes=61.5)
    page = html_report(compare([Run("run", results)]))
    assert "<td>0.412</td><td>61.5</td>" in page
