"""The benchmark of smaller vocabularies, on a tiny model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import vocabulary
from tests.conftest import make_tiny_llama
from tests.pruning.test_vocabulary import ROWS, byte_level, save


@pytest.mark.slow
def test_a_row_per_size(
    tmp_path: Path, few_articles: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": ROWS, "bos_token_id": 1, "max_position_embeddings": 2048}
    folder = save(make_tiny_llama(tmp_path / "model", **sizes), byte_level())
    arguments = ["--folder", str(folder), "--sizes", "500", "400", "--chunks", "2"]
    monkeypatch.setattr(sys, "argv", ["vocabulary", *arguments])
    vocabulary.main()
    rows = re.findall(r"^\| (\d+) +\|(.*)\|$", capsys.readouterr().out, re.MULTILINE)
    assert [int(size) for size, _ in rows] == [ROWS, 500, 400]
    cells = [[cell.strip() for cell in row.split("|")] for _, row in rows]
    assert [row[5] for row in cells] == ["", "0", "0"]
    assert float(cells[2][1]) >= float(cells[1][1]) >= float(cells[0][1])
