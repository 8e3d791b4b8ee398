"""The page that leads from a paper to its code names files, functions and papers that are there.

Sources are parsed, not imported: some of them import NeMo.
"""

import ast
import re
from pathlib import Path

import pytest

from tests.documents import ROOT, code_spans

PAGE = ROOT / "docs" / "papers.md"
PACKAGE = ROOT / "nemo_pvs"
ARXIV = re.compile(r"\b\d\d(?:0[1-9]|1[0-2])\.\d{5}\b")


def _rows(page: Path) -> list[tuple[list[str], str]]:
    """Return the names and the file of every row of a table whose last columns are ``code`` and ``file``."""
    rows = []
    for table in page.read_text().split("\n\n"):
        header, *lines = table.splitlines()
        if header.endswith("| code | file |"):
            for line in lines[1:]:
                *_, code, file, _ = line.split("|")
                (path,) = re.findall(r"`([^`]+)`", file)
                rows.append((re.findall(r"`([^`]+)`", code), path))
    return rows


def _file(path: str) -> Path:
    return (ROOT if path.startswith("recipes/") else PACKAGE) / path


def _defined(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Return the functions, classes and constants of a body, and the members of classes as ``Class.member``."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= _defined(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _missing(page: Path) -> list[str]:
    """Return what the tables of a page name and the sources do not have."""
    missing = []
    for names, path in _rows(page):
        file = _file(path)
        if not file.is_file():
            missing.append(path)
        elif file.suffix == ".py":
            assert names, f"the row of {path} names nothing in it"
            defined = _defined(ast.parse(file.read_text()).body)
            missing += [f"{name} in {path}" for name in names if name not in defined]
    return missing


def test_every_name_is_defined_in_its_file():
    assert len(_rows(PAGE)) > 80
    assert not _missing(PAGE)


@pytest.mark.parametrize(
    ("named", "instead", "missing"),
    [
        ("`wanda_mask`", "`mask_of_wanda`", "mask_of_wanda in pruning/sparse/wanda.py"),
        ("`MaskLearner.learn`", "`MaskLearner.step`", "MaskLearner.step in pruning/learned/mask_learning.py"),
        ("`pruning/presets.yaml`", "`pruning/targets.yaml`", "pruning/targets.yaml"),
    ],
)
def test_what_is_renamed_in_the_code_alone_is_missing(named, instead, missing, tmp_path):
    page = tmp_path / "papers.md"
    page.write_text(PAGE.read_text().replace(named, instead))
    assert _missing(page) == [missing]


def test_every_file_of_a_folder_is_in_it():
    """The files of the methods that have one in several packages, by folder."""
    table = next(part for part in PAGE.read_text().split("\n\n") if part.startswith("| folder |"))
    files = []
    for line in table.splitlines()[2:]:
        folder, *names = re.findall(r"`([^`]+(?:/|\.py))`", line)
        files += [PACKAGE / folder / name for name in names]
    assert len(files) > 15
    assert not [file for file in files if not file.is_file()]


def test_every_folder_exists():
    folders = [span for span in code_spans(PAGE) if span.endswith("/")]
    assert folders
    assert not [folder for folder in folders if not ((PACKAGE / folder).is_dir() or (ROOT / folder).is_dir())]


def test_every_paper_of_a_method_has_a_heading():
    papers = {}
    for file in (PACKAGE / "pruning" / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "paper":
                papers[file.stem] = ast.literal_eval(node.value)
    assert len(papers) > 10
    headings = "\n".join(re.findall(r"^## .*", PAGE.read_text(), re.MULTILINE))
    assert not {method: paper for method, paper in papers.items() if paper not in headings}


def test_the_papers_are_those_that_the_code_names():
    files = [file for kind in ("py", "yaml") for file in PACKAGE.rglob(f"*.{kind}")]
    named = {number for file in files for number in ARXIV.findall(file.read_text())}
    assert set(ARXIV.findall(PAGE.read_text())) == named
