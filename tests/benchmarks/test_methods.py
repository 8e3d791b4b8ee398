"""The table in docs/methods.md has every method, and the files that it names are there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import methods
from tests.conftest import make_tiny_llama, save_tiny_tokenizer


@pytest.mark.slow
def test_every_method_has_a_row(tmp_path, few_articles, monkeypatch, capsys):
    sizes = {"num_hidden_layers": 10, "num_key_value_heads": 4, "hidden_size": 72, "intermediate_size": 144}
    folder = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model", **sizes))
    arguments = ["--folder", str(folder), "--samples", "4", "--sequence-length", "16"]
    monkeypatch.setattr(sys, "argv", ["methods", *arguments])
    methods.main()
    printed = re.findall(r"^\| `--method (\S+) .*?` +\|(.*)\|$", capsys.readouterr().out, re.MULTILINE)
    rows = [(method, [cell.strip() for cell in cells.split("|")]) for method, cells in printed]
    assert {method for method, _ in rows} == set(methods.METHODS)
    for method, (_, _, zeros, loss, _, _) in rows:
        assert float(loss) < 10
        assert zeros == ("50.0%" if method in {"sparsegpt", "wanda", "magnitude"} else "0.0%")


def test_the_tests_it_names_are_there():
    for case in methods.cases(30, 576, 1536):
        assert (Path(__file__).parents[1] / case.tests).is_file()
