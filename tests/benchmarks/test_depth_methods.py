"""The benchmark of depth methods still runs, on a model that takes seconds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import depth_methods
from tests.conftest import make_tiny_llama, save_tiny_tokenizer


@pytest.mark.slow
def test_every_method_has_a_row_for_every_size(
    tmp_path: Path, few_articles: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model", num_hidden_layers=5))
    arguments = ["--folder", str(folder), "--keep", "4", "2", "--samples", "2", "--sequence-length", "16"]
    monkeypatch.setattr(sys, "argv", ["depth_methods", *arguments])
    depth_methods.main()
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ *[42] +(?:contiguous|greedy|individual|shortgpt) ", printed, re.MULTILINE)) == 8
